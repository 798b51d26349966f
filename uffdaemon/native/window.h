/* SPDX-License-Identifier: Apache-2.0 */
/* How much a rule fills for one fault: what the page book says of its window. */
#ifndef UFFDAEMON_WINDOW_H
#define UFFDAEMON_WINDOW_H

#include <stdint.h>

#include "pages.h"
#include "table.h"
#include "uapi.h"

/* The index of the page at an address.  Page sizes are powers of two, and a division would take
 * longer than all else here. */
static inline uint64_t page_at(const struct uffdaemon_rule *rule, uint64_t address)
{
    return (address - rule->origin) >> __builtin_ctzll(rule->page_size);
}

static inline enum uffdaemon_page_state state_of(const struct uffdaemon_rule *rule, uint64_t page)
{
    if (!rule->pages)
        return UFFDAEMON_PAGE_ABSENT;
    return uffdaemon_pages_state(uffdaemon_rule_pages(rule), page);
}

/* Whether the page's owner ever discarded it. */
static inline int ever_discarded(const struct uffdaemon_rule *rule, uint64_t page)
{
    return state_of(rule, page) & UFFDAEMON_PAGE_DISCARDED;
}

/* Whether the page gets zeros, since it was discarded. */
static inline int needs_zeros(const struct uffdaemon_rule *rule, uint64_t address)
{
    return rule->zeros && rule->kind == 0 && rule->code != _UFFDIO_POISON &&
           ever_discarded(rule, page_at(rule, address));
}

/* Whether the same page can be filled more than once: a move leaves nothing at its source. */
static inline int repeats(const struct uffdaemon_rule *rule)
{
    return rule->code != _UFFDIO_MOVE && rule->code != _UFFDIO_POISON;
}

/* Whether a page was discarded, and gets something else than its neighbours. */
static inline int filled_alone(const struct uffdaemon_rule *rule, uint64_t address)
{
    return (rule->zeros || rule->kind || !repeats(rule)) &&
           ever_discarded(rule, page_at(rule, address));
}

/* Whether a page may be filled along with a neighbour: with `again`, though the book has it as
 * present. */
static inline int fillable(const struct uffdaemon_rule *rule, uint64_t address, int again)
{
    return !filled_alone(rule, address) &&
           (again || !(state_of(rule, page_at(rule, address)) & UFFDAEMON_PAGE_CLEAN));
}

/* Widens a page to the aligned window around it, clamped to the rule and to the run of pages that
 * are fillable. */
static inline void widen(const struct uffdaemon_rule *rule, int again, uint64_t *from, uint64_t *to)
{
    uint64_t size = rule->page_size;
    uint64_t offset = *from - rule->origin;
    uint64_t low = rule->origin + offset - offset % rule->window;
    uint64_t high = low + rule->window;

    if (low < rule->start)
        low = rule->start;
    if (high > rule->end)
        high = rule->end;
    while (*from > low && fillable(rule, *from - size, again))
        *from -= size;
    while (*to < high && fillable(rule, *to, again))
        *to += size;
}

/* Widens the page of a fault, unless it is filled alone.  Returns whether the book has it as
 * present, so that `refill` has to look first. */
static __attribute__((noinline)) int widen_first(const struct uffdaemon_rule *rule, uint64_t *from,
                                                 uint64_t *to)
{
    if (filled_alone(rule, *from))
        return 0;
    if (state_of(rule, page_at(rule, *from)) & UFFDAEMON_PAGE_CLEAN)
        return repeats(rule);
    widen(rule, 0, from, to);
    return 0;
}

/* The range to fill for one fault, in bytes.  Returns whether it is one for `refill`. */
static inline int window(const struct uffdaemon_rule *rule, uint64_t address, uint64_t *from,
                         uint64_t *to)
{
    *from = address & ~(rule->page_size - 1);
    *to = *from + rule->page_size;
    return rule->window > rule->page_size && widen_first(rule, from, to);
}

#endif
