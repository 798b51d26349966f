/* SPDX-License-Identifier: Apache-2.0 */
/* The page book: reference-counted, shared by rules and Python. */
#define _GNU_SOURCE
#include "pages.h"
#include "base.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define LINE 64 /* bytes in a cache line */
#define EACH_LOWER UINT64_C(0x5555555555555555)

static size_t words_of(uint64_t count)
{
    return count / UFFDAEMON_PAGES_IN_WORD + 1;
}

static size_t size_of(uint64_t count)
{
    return sizeof(struct uffdaemon_pages_storage) + words_of(count) * sizeof(uint64_t);
}

static struct uffdaemon_pages *book_new(uint64_t count, size_t more)
{
    size_t size = (sizeof(struct uffdaemon_pages) + LINE - 1) / LINE * LINE;
    struct uffdaemon_pages *pages = uffdaemon_alloc(size + more);

    if (!pages)
        return NULL;
    pages->count = count;
    pages->fd = -1;
    pages->references = 1;
    pages->storage = (void *)((char *)pages + size);
    pages->words = pages->storage->words;
    return pages;
}

static int book_map(struct uffdaemon_pages *pages, int fd, uint64_t offset)
{
    size_t size = size_of(pages->count);
    void *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);

    if (mapped == MAP_FAILED)
        return errno;
    pages->storage = mapped;
    pages->words = pages->storage->words;
    pages->mapped = size;
    return 0;
}

/* In private memory, allocated as it is written to.  NULL: no memory. */
struct uffdaemon_pages *uffdaemon_pages_new(uint64_t count)
{
    struct uffdaemon_pages *pages = book_new(count, size_of(count));

    if (pages)
        pages->storage->count = count;
    return pages;
}

/* In a memory file, whose descriptor is duplicated.  An empty file starts with all pages absent;
 * any other must be a book of as many pages.  NULL on failure, with an errno in *error. */
struct uffdaemon_pages *uffdaemon_pages_map(int fd, uint64_t count, int *error)
{
    struct uffdaemon_pages *pages = book_new(count, 0);
    struct stat file;

    *error = ENOMEM;
    if (!pages)
        return NULL;
    pages->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (pages->fd < 0 || fstat(fd, &file) ||
        (file.st_size == 0 && ftruncate(fd, (off_t)size_of(count))))
        *error = errno;
    else if (file.st_size && (size_t)file.st_size != size_of(count))
        *error = EINVAL;
    else
        *error = book_map(pages, fd, 0);
    if (!*error && file.st_size == 0)
        pages->storage->count = count;
    if (!*error && pages->storage->count != count)
        *error = EINVAL;
    if (!*error)
        return pages;
    uffdaemon_pages_put(pages);
    return NULL;
}

/* In a part of a file, which is large enough (`uffdaemon_pages_size`).  It has zeros, or the book
 * of as many pages.  NULL on failure, with an errno in *error. */
struct uffdaemon_pages *uffdaemon_pages_map_part(int fd, uint64_t offset, uint64_t count,
                                                 int *error)
{
    struct uffdaemon_pages *pages = book_new(count, 0);

    *error = ENOMEM;
    if (!pages)
        return NULL;
    pages->offset = offset;
    *error = book_map(pages, fd, offset);
    if (!*error && !pages->storage->count)
        pages->storage->count = count;
    if (!*error && pages->storage->count != count)
        *error = EINVAL;
    if (!*error)
        return pages;
    uffdaemon_pages_put(pages);
    return NULL;
}

/* The bytes that a book takes in a file. */
uint64_t uffdaemon_pages_size(uint64_t count)
{
    return size_of(count);
}

static void copy_states(struct uffdaemon_pages *copy, const struct uffdaemon_pages *pages)
{
    copy->storage->any_discarded = pages->storage->any_discarded;
    for (size_t index = 0; index < words_of(pages->count); index++) {
        uint64_t word = atomic_load_explicit(&pages->words[index], memory_order_relaxed);

        if (word) /* writing zeros would allocate memory */
            atomic_store_explicit(&copy->words[index], word, memory_order_relaxed);
    }
}

/* Copies the states into a new book of as many pages, which nobody uses yet. */
void uffdaemon_pages_copy_into(struct uffdaemon_pages *copy, const struct uffdaemon_pages *pages)
{
    if (copy->count == pages->count)
        copy_states(copy, pages);
}

/* An independent copy, in storage of the same kind.  NULL: no memory, or no descriptor. */
struct uffdaemon_pages *uffdaemon_pages_copy(const struct uffdaemon_pages *pages)
{
    struct uffdaemon_pages *copy;
    int error, fd;

    if (pages->fd < 0) {
        copy = uffdaemon_pages_new(pages->count);
    } else {
        fd = memfd_create("uffdaemon pages", MFD_CLOEXEC);
        copy = fd < 0 ? NULL : uffdaemon_pages_map(fd, pages->count, &error);
        if (fd >= 0)
            close(fd);
    }
    if (!copy)
        return NULL;
    copy_states(copy, pages);
    return copy;
}

void uffdaemon_pages_get(struct uffdaemon_pages *pages)
{
    if (pages)
        atomic_fetch_add_explicit(&pages->references, 1, memory_order_relaxed);
}

/* Closes the descriptor of the memory file; the states stay mapped. */
void uffdaemon_pages_close_file(struct uffdaemon_pages *pages)
{
    if (pages->fd >= 0)
        close(pages->fd);
    pages->fd = -1;
}

void uffdaemon_pages_put(struct uffdaemon_pages *pages)
{
    if (!pages || atomic_fetch_sub(&pages->references, 1) != 1)
        return;
    if (pages->mapped)
        munmap(pages->storage, pages->mapped);
    uffdaemon_pages_close_file(pages);
    uffdaemon_free(pages);
}

/* The lower bits of pages `first` to `end` in the word of `first`; *next is the page after the
 * last of them. */
static uint64_t lower_bits(uint64_t first, uint64_t end, uint64_t *next)
{
    uint64_t mask = EACH_LOWER << first % UFFDAEMON_PAGES_IN_WORD * 2;

    *next = (first / UFFDAEMON_PAGES_IN_WORD + 1) * UFFDAEMON_PAGES_IN_WORD;
    if (*next > end) {
        mask &= EACH_LOWER >> (*next - end) * 2;
        *next = end;
    }
    return mask;
}

/* The new value of a word, given the lower bits of the pages that change. */
static uint64_t filled(uint64_t word, uint64_t lower)
{
    return word | lower;
}

static uint64_t emptied(uint64_t word, uint64_t lower)
{
    return word & ~lower;
}

static uint64_t discarded(uint64_t word, uint64_t lower)
{
    return (word & ~lower) | lower << 1;
}

static uint64_t voided(uint64_t word, uint64_t lower)
{
    return discarded(word, lower & ~(word >> 1));
}

static inline void change(struct uffdaemon_pages *pages, uint64_t first, uint64_t end,
                          uint64_t (*changed)(uint64_t word, uint64_t lower))
{
    uint64_t next;

    if (end > pages->count)
        end = pages->count;
    for (; first < end; first = next) {
        _Atomic uint64_t *at = &pages->words[first / UFFDAEMON_PAGES_IN_WORD];
        uint64_t lower = lower_bits(first, end, &next);
        uint64_t word = atomic_load_explicit(at, memory_order_relaxed);

        /* An unchanged word is not written: that could allocate memory, or take another core's
         * line. */
        while (changed(word, lower) != word &&
               !atomic_compare_exchange_weak_explicit(at, &word, changed(word, lower),
                                                      memory_order_acq_rel, memory_order_relaxed))
            ;
    }
}

/* Marks pages as present. */
UFFDAEMON_HOT void uffdaemon_pages_fill(struct uffdaemon_pages *pages, uint64_t first, uint64_t end)
{
    change(pages, first, end, filled);
}

/* Marks pages as not present, since they were moved away; what a fault there gets stays the
 * same. */
void uffdaemon_pages_empty(struct uffdaemon_pages *pages, uint64_t first, uint64_t end)
{
    change(pages, first, end, emptied);
}

static void note_discard(struct uffdaemon_pages *pages)
{
    if (!atomic_load_explicit(&pages->storage->any_discarded, memory_order_relaxed))
        atomic_store_explicit(&pages->storage->any_discarded, 1, memory_order_relaxed);
}

/* Marks pages as discarded by their owner. */
void uffdaemon_pages_discard(struct uffdaemon_pages *pages, uint64_t first, uint64_t end)
{
    note_discard(pages);
    change(pages, first, end, discarded);
}

/* Marks as discarded the pages that never were: for an event that may have been applied already. */
void uffdaemon_pages_void(struct uffdaemon_pages *pages, uint64_t first, uint64_t end)
{
    note_discard(pages);
    change(pages, first, end, voided);
}
