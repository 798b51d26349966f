/* SPDX-License-Identifier: Apache-2.0 */
/* The page states at the time a FORK event was read: a child starts with them. */
#define _GNU_SOURCE
#include "snapshot.h"

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base.h"

struct uffdaemon_snapshot {
    size_t count;
    struct pair {
        struct uffdaemon_pages *original; /* a reference, so that its address is not reused */
        struct uffdaemon_pages *copy;     /* NULL: taken, or no memory */
    } pairs[];
};

static struct pair *find(struct uffdaemon_snapshot *snapshot,
                         const struct uffdaemon_pages *original)
{
    for (size_t index = snapshot->count; index-- > 0;) /* neighbouring rules share a region */
        if (snapshot->pairs[index].original == original)
            return &snapshot->pairs[index];
    return NULL;
}

/* Copies the states of all regions that have rules; NULL: no memory. */
struct uffdaemon_snapshot *uffdaemon_snapshot_new(const struct uffdaemon_table *table)
{
    struct uffdaemon_snapshot *snapshot = uffdaemon_alloc(sizeof(*snapshot) +
                                                          table->count * sizeof(struct pair));

    if (!snapshot)
        return NULL;
    for (size_t index = 0; index < table->count; index++) {
        struct uffdaemon_pages *original = uffdaemon_rule_pages(&table->rules[index]);

        if (!original || find(snapshot, original))
            continue;
        uffdaemon_pages_get(original);
        snapshot->pairs[snapshot->count++] = (struct pair){original,
                                                           uffdaemon_pages_copy(original)};
    }
    return snapshot;
}

/* The copy of one region's states, now owned by the caller; NULL: none. */
struct uffdaemon_pages *uffdaemon_snapshot_take(struct uffdaemon_snapshot *snapshot,
                                                struct uffdaemon_pages *original)
{
    struct pair *found = find(snapshot, original);
    struct uffdaemon_pages *copy;

    if (!found)
        return NULL;
    copy = found->copy;
    found->copy = NULL;
    return copy;
}

static uint64_t whole_pages(uint64_t bytes)
{
    uint64_t page = uffdaemon_page_size();

    return (bytes + page - 1) / page * page;
}

/* Writes the books to a new memory file, for a process that has only that: a head of {books,
 * {offset of the original in its file, pages, offset in this file}...}, and the states.  Returns
 * its descriptor, or -1: there is no memory, or no descriptor. */
int uffdaemon_snapshot_write(const struct uffdaemon_snapshot *snapshot)
{
    size_t words = 1 + 3 * snapshot->count;
    uint64_t at = whole_pages(words * sizeof(uint64_t)), *head = uffdaemon_alloc(at);
    int fd = memfd_create("uffdaemon fork", MFD_CLOEXEC), error, failed = fd < 0 || !head;

    for (size_t index = 0; !failed && index < snapshot->count; index++) {
        const struct uffdaemon_pages *copy = snapshot->pairs[index].copy;
        uint64_t size = copy ? whole_pages(uffdaemon_pages_size(copy->count)) : 0;
        struct uffdaemon_pages *part = NULL;

        if (copy && ftruncate(fd, (off_t)(at + size)) == 0)
            part = uffdaemon_pages_map_part(fd, at, copy->count, &error);
        failed = !part;
        if (failed)
            break;
        uffdaemon_pages_copy_into(part, copy);
        uffdaemon_pages_put(part);
        head[1 + 3 * index] = snapshot->pairs[index].original->offset;
        head[2 + 3 * index] = copy->count;
        head[3 + 3 * index] = at;
        at += size;
    }
    if (!failed) {
        head[0] = snapshot->count;
        failed = pwrite(fd, head, words * sizeof(uint64_t), 0) !=
                 (ssize_t)(words * sizeof(uint64_t));
    }
    uffdaemon_free(head);
    if (failed && fd >= 0)
        close(fd);
    return failed ? -1 : fd;
}

void uffdaemon_snapshot_free(struct uffdaemon_snapshot *snapshot)
{
    if (!snapshot)
        return;
    for (size_t index = 0; index < snapshot->count; index++) {
        uffdaemon_pages_put(snapshot->pairs[index].original);
        uffdaemon_pages_put(snapshot->pairs[index].copy);
    }
    uffdaemon_free(snapshot);
}
