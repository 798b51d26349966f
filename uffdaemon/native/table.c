/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The rules in force, replaced while faults arrive.
 *
 * A table is immutable while in force.  Readers, signal handlers among them, never block; a writer
 * publishes another table and frees the old one after a grace period, which lasts one ioctl at
 * most.
 */
#include "table.h"
#include "base.h"

_Atomic uint64_t uffdaemon_tables_replaced;

/* An empty table with room for `capacity` rules, or NULL. */
struct uffdaemon_table *uffdaemon_table_new(size_t capacity)
{
    return uffdaemon_alloc(sizeof(struct uffdaemon_table) +
                           capacity * sizeof(struct uffdaemon_rule));
}

/* Adds a copy of a rule. */
void uffdaemon_table_add(struct uffdaemon_table *table, const struct uffdaemon_rule *rule)
{
    table->rules[table->count++] = *rule;
    uffdaemon_pages_get(uffdaemon_rule_pages(rule));
}

/* Frees a table that has no readers. */
void uffdaemon_table_free(struct uffdaemon_table *table)
{
    if (!table)
        return;
    for (size_t index = 0; index < table->count; index++)
        uffdaemon_pages_put(uffdaemon_rule_pages(&table->rules[index]));
    uffdaemon_free(table);
}

static void set_bounds(struct uffdaemon_rules *rules, const struct uffdaemon_table *table)
{
    uint64_t low = UINT64_MAX, high = 0;

    for (size_t index = 0; table && index < table->count; index++) {
        if (table->rules[index].start < low)
            low = table->rules[index].start;
        if (table->rules[index].end > high)
            high = table->rules[index].end;
    }
    atomic_store_explicit(&rules->low, low, memory_order_relaxed);
    atomic_store_explicit(&rules->high, high, memory_order_relaxed);
}

/* Publishes `table` (NULL: no rules) and takes ownership of it.  The old one has been freed when
 * this returns. */
void uffdaemon_table_replace(struct uffdaemon_rules *rules, struct uffdaemon_table *table)
{
    struct uffdaemon_table *old = atomic_exchange(&rules->table, table);

    atomic_fetch_add(&uffdaemon_tables_replaced, 1);
    set_bounds(rules, table);
    uffdaemon_synchronize(&rules->readers);
    uffdaemon_table_free(old);
}
