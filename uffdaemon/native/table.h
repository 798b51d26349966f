/* SPDX-License-Identifier: Apache-2.0 */
/* The rules in force: read without locks, replaced as a whole. */
#ifndef UFFDAEMON_TABLE_H
#define UFFDAEMON_TABLE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "grace.h"
#include "pages.h"

/* A policy for a range that C can carry out by itself.  96 bytes, packed by Python's struct. */
struct uffdaemon_rule {
    uint64_t kind;      /* fault flags WP and MINOR that it resolves; rules are sorted by it, */
    uint64_t start;     /* then by this (bytes) */
    uint64_t end;       /* bytes, exclusive */
    uint64_t code;      /* _UFFDIO_COPY, _UFFDIO_ZEROPAGE, ...; 0: Python decides */
    uint64_t mode;      /* the ioctl's mode bits */
    uint64_t src;       /* bytes; the contents for `start`, 0 for operations without a source */
    uint64_t origin;    /* bytes; the region's start: windows are aligned from it */
    uint64_t page_size; /* bytes, a power of two */
    uint64_t window;    /* bytes to fill around a fault, at least page_size */
    uint64_t pages;     /* address of the region's struct uffdaemon_pages; 0: none */
    uint64_t zeros;     /* contents of a discarded page: 0: the same as before; 1: ZEROPAGE; else
                           COPY, in `mode`, from this address, which holds a page of zeros */
    uint64_t refusal;   /* for a page whose contents are unavailable: 0: ask Python; else this
                           operation, _UFFDIO_POISON */
};
_Static_assert(sizeof(struct uffdaemon_rule) == 96, "uffdaemon_rule");

/* Immutable while in force.  Each rule holds a reference to its pages. */
struct uffdaemon_table {
    uint64_t count;
    struct uffdaemon_rule rules[];
};

/* The rules of one port.  The table is replaced under the port's `change`. */
struct uffdaemon_rules {
    struct uffdaemon_table *_Atomic table; /* NULL: no rules */
    _Atomic uint64_t low, high;            /* bounds of all rules, bytes */
    struct uffdaemon_readers readers;      /* of `table` */
};

/* How often any table has been replaced. */
extern _Atomic uint64_t uffdaemon_tables_replaced;

static inline struct uffdaemon_pages *uffdaemon_rule_pages(const struct uffdaemon_rule *rule)
{
    return (struct uffdaemon_pages *)(uintptr_t)rule->pages;
}

struct uffdaemon_table *uffdaemon_table_new(size_t capacity);
void uffdaemon_table_add(struct uffdaemon_table *table, const struct uffdaemon_rule *rule);
void uffdaemon_table_free(struct uffdaemon_table *table);
void uffdaemon_table_replace(struct uffdaemon_rules *rules, struct uffdaemon_table *table);

/* The table in force, or NULL; valid until `uffdaemon_read_unlock`. */
static inline struct uffdaemon_table *uffdaemon_table_load(struct uffdaemon_rules *rules)
{
    return atomic_load(&rules->table);
}

/* The rule for a fault, or NULL: a binary search by (kind, start). */
static inline const struct uffdaemon_rule *uffdaemon_table_find(const struct uffdaemon_table *table,
                                                                uint64_t kind, uint64_t address)
{
    const struct uffdaemon_rule *rules = table->rules;
    size_t low = 0, high = table->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (rules[middle].kind < kind ||
            (rules[middle].kind == kind && rules[middle].start <= address))
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0 || rules[low - 1].kind != kind || address >= rules[low - 1].end)
        return NULL;
    return &rules[low - 1];
}

#endif
