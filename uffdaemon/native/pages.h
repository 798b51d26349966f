/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The page book: the state of each page of a region, two bits a page.
 *
 *   bits  state            contents
 *   00    absent           a fault gets those of the source
 *   01    present, clean   those of the source
 *   11    present, dirty   others, such as zeros after a discard
 *   10    discarded        a fault gets zeros
 *
 * The upper bit means that the source no longer applies.  It is never cleared: the kernel empties a
 * range only after its REMOVE event was read, so a page filled in between vanishes without an
 * event. The book is only a hint that saves work: the kernel may drop pages without an event.
 *
 * All functions may be called from any thread; those that only read or change bits, from signal
 * handlers too.
 */
#ifndef UFFDAEMON_PAGES_H
#define UFFDAEMON_PAGES_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum uffdaemon_page_state {
    UFFDAEMON_PAGE_ABSENT = 0,
    UFFDAEMON_PAGE_CLEAN = 1,
    UFFDAEMON_PAGE_DISCARDED = 2,
    UFFDAEMON_PAGE_DIRTY = 3,
};

#define UFFDAEMON_PAGES_IN_WORD 32

/* Storage of the states: private memory, or a memory file that other processes can map. */
struct uffdaemon_pages_storage {
    uint64_t count; /* pages; 0: a new file */
    _Atomic uint32_t any_discarded;
    uint32_t padding[13];
    _Atomic uint64_t words[];
};
_Static_assert(offsetof(struct uffdaemon_pages_storage, words) == 64, "one cache line");

struct uffdaemon_pages {
    _Atomic uint64_t *words; /* constant, as are all fields but `references` and `fd` */
    uint64_t count;          /* pages */
    struct uffdaemon_pages_storage *storage;
    uint64_t mapped; /* bytes mapped for `storage`; 0: it follows this structure */
    uint64_t offset; /* of the storage, in a file that has more */
    int32_t fd;      /* the memory file, or -1; used by one thread at a time */
    _Atomic uint32_t references;
};

struct uffdaemon_pages *uffdaemon_pages_new(uint64_t count);
struct uffdaemon_pages *uffdaemon_pages_map(int fd, uint64_t count, int *error);
struct uffdaemon_pages *uffdaemon_pages_map_part(int fd, uint64_t offset, uint64_t count,
                                                 int *error);
uint64_t uffdaemon_pages_size(uint64_t count);
void uffdaemon_pages_copy_into(struct uffdaemon_pages *copy, const struct uffdaemon_pages *pages);
struct uffdaemon_pages *uffdaemon_pages_copy(const struct uffdaemon_pages *pages);
void uffdaemon_pages_get(struct uffdaemon_pages *pages);
void uffdaemon_pages_put(struct uffdaemon_pages *pages);
void uffdaemon_pages_close_file(struct uffdaemon_pages *pages);

/* Pages `first` to `end`, exclusive, clamped to `count`. */
void uffdaemon_pages_fill(struct uffdaemon_pages *pages, uint64_t first, uint64_t end);
void uffdaemon_pages_empty(struct uffdaemon_pages *pages, uint64_t first, uint64_t end);
void uffdaemon_pages_discard(struct uffdaemon_pages *pages, uint64_t first, uint64_t end);
void uffdaemon_pages_void(struct uffdaemon_pages *pages, uint64_t first, uint64_t end);

/* The state of one page; one load. */
static inline enum uffdaemon_page_state uffdaemon_pages_state(const struct uffdaemon_pages *pages,
                                                              uint64_t page)
{
    uint64_t word = atomic_load_explicit(&pages->words[page / UFFDAEMON_PAGES_IN_WORD],
                                         memory_order_acquire);

    return (enum uffdaemon_page_state)(word >> page % UFFDAEMON_PAGES_IN_WORD * 2 & 3);
}

#endif
