/* SPDX-License-Identifier: Apache-2.0 */
/* The states of all pages at the moment at which a FORK event was read: what a child begins with. */
#include "snapshot.h"

#include <stdlib.h>

struct uffdaemon_snapshot {
    size_t count;
    struct pair {
        struct uffdaemon_pages *original; /* kept, so that its address means nothing else */
        struct uffdaemon_pages *copy;     /* NULL: taken, or there was no memory */
    } pairs[];
};

static int by_original(const void *left, const void *right)
{
    uintptr_t a = (uintptr_t)((const struct pair *)left)->original;
    uintptr_t b = (uintptr_t)((const struct pair *)right)->original;

    return a < b ? -1 : a > b;
}

/* Copies the states of all regions that have rules; NULL: there is no memory. */
struct uffdaemon_snapshot *uffdaemon_snapshot_new(const struct uffdaemon_table *table)
{
    struct uffdaemon_snapshot *snapshot = malloc(sizeof(*snapshot) +
                                                 table->count * sizeof(struct pair));
    size_t kept = 0;

    if (!snapshot)
        return NULL;
    for (size_t index = 0; index < table->count; index++)
        snapshot->pairs[index] = (struct pair){uffdaemon_rule_pages(&table->rules[index]), NULL};
    qsort(snapshot->pairs, table->count, sizeof(struct pair), by_original);
    for (size_t index = 0; index < table->count; index++) {
        struct uffdaemon_pages *original = snapshot->pairs[index].original;

        if (!original || (kept && snapshot->pairs[kept - 1].original == original))
            continue;
        uffdaemon_pages_get(original);
        snapshot->pairs[kept++] = (struct pair){original, uffdaemon_pages_copy(original)};
    }
    snapshot->count = kept;
    return snapshot;
}

/* The copy of one region's states, which is the caller's from now on; NULL: there is none. */
struct uffdaemon_pages *uffdaemon_snapshot_take(struct uffdaemon_snapshot *snapshot,
                                                struct uffdaemon_pages *original)
{
    struct pair key = {original, NULL}, *found;
    struct uffdaemon_pages *copy;

    found = bsearch(&key, snapshot->pairs, snapshot->count, sizeof(key), by_original);
    if (!found)
        return NULL;
    copy = found->copy;
    found->copy = NULL;
    return copy;
}

void uffdaemon_snapshot_free(struct uffdaemon_snapshot *snapshot)
{
    if (!snapshot)
        return;
    for (size_t index = 0; index < snapshot->count; index++) {
        uffdaemon_pages_put(snapshot->pairs[index].original);
        uffdaemon_pages_put(snapshot->pairs[index].copy);
    }
    free(snapshot);
}
