/* SPDX-License-Identifier: Apache-2.0 */
/* The page states at the time a FORK event was read: a child starts with them. */
#include "snapshot.h"
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
