/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Applying events to rules and page states, without Python.
 *
 * The thread that caused an event continues as soon as the message has been read, and may touch its
 * memory at once, with the GIL held.  So the event is applied before any other fault is resolved.
 * Python gets the event later, and updates its own state then.
 */
#include "events.h"

#include "base.h"
#include "journal.h"
#include "pages.h"
#include "queue.h"
#include "record.h"
#include "snapshot.h"
#include "table.h"

static int before(const struct uffdaemon_rule *a, const struct uffdaemon_rule *b)
{
    return a->kind != b->kind ? a->kind < b->kind : a->start < b->start;
}

/* Merges two sorted tables.  Not qsort(3), which may allocate: a fork that waits for its event
 * to be read holds malloc's locks. */
static void merge(struct uffdaemon_table *into, const struct uffdaemon_table *a,
                  const struct uffdaemon_table *b)
{
    size_t left = 0, right = 0;

    while (left < a->count || right < b->count)
        if (right == b->count || (left < a->count && before(&a->rules[left], &b->rules[right])))
            uffdaemon_table_add(into, &a->rules[left++]);
        else
            uffdaemon_table_add(into, &b->rules[right++]);
}

/* Whether the pages went because an exact copy has released its source: their contents live on
 * where they were copied to.  Releases go from low to high addresses. */
static int released(struct uffdaemon_port *port, uint64_t start, uint64_t end)
{
    for (size_t index = 0; index < UFFDAEMON_RELEASES; index++)
        if (port->releases[index].start <= start && end <= port->releases[index].end) {
            port->releases[index].start = end;
            return 1;
        }
    return 0;
}

/* The pages from `start` to `end` were discarded, or have moved away.  Returns whether all of them
 * are in a page book. */
static int removed(const struct uffdaemon_table *table, uint64_t start, uint64_t end,
                   void (*change)(struct uffdaemon_pages *pages, uint64_t first, uint64_t end))
{
    uint64_t covered = 0;

    for (size_t index = 0; index < table->count; index++) {
        const struct uffdaemon_rule *rule = &table->rules[index];
        uint64_t low = start > rule->start ? start : rule->start;
        uint64_t high = end < rule->end ? end : rule->end;

        if (low >= high || !rule->pages)
            continue;
        covered += rule->kind ? 0 : high - low;
        change(uffdaemon_rule_pages(rule), (low - rule->origin) / rule->page_size,
               (high - rule->origin + rule->page_size - 1) / rule->page_size);
    }
    return covered == end - start;
}

static void put(struct uffdaemon_table *table, const struct uffdaemon_rule *rule, uint64_t start,
                uint64_t end, uint64_t shift)
{
    struct uffdaemon_rule part = *rule;

    /* Memory never moves by part of a page. */
    if (start >= end || shift & (rule->page_size - 1))
        return;
    if (part.src)
        part.src += start - rule->start;
    part.start = start + shift;
    part.end = end + shift;
    part.origin += shift;
    uffdaemon_table_add(table, &part);
}

/* Adds each rule without the range from `start` to `end`. */
static void put_outside(struct uffdaemon_table *table, const struct uffdaemon_table *from,
                        uint64_t start, uint64_t end)
{
    for (size_t index = 0; index < from->count; index++) {
        const struct uffdaemon_rule *rule = &from->rules[index];

        put(table, rule, rule->start, rule->end < start ? rule->end : start, 0);
        put(table, rule, rule->start > end ? rule->start : end, rule->end, 0);
    }
}

/* The range was unmapped, or with `moves` has moved up by `shift` bytes: updates the rules. */
static void moved(struct uffdaemon_port *port, uint64_t start, uint64_t end, int moves,
                  uint64_t shift)
{
    const struct uffdaemon_table *old = uffdaemon_table_load(&port->rules);
    struct uffdaemon_table *rest, *kept, *arrived, *all;
    size_t count = old ? old->count : 0;

    if (!old)
        return;
    rest = uffdaemon_table_new(2 * count);
    kept = uffdaemon_table_new(4 * count);
    arrived = uffdaemon_table_new(count);
    all = uffdaemon_table_new(5 * count);
    if (rest && kept && arrived && all) {
        put_outside(rest, old, start, end);
        /* mremap(2) has unmapped whatever was at the target. */
        put_outside(kept, rest, moves ? start + shift : start, moves ? end + shift : end);
        for (size_t index = 0; moves && index < count; index++) {
            const struct uffdaemon_rule *rule = &old->rules[index];

            put(arrived, rule, rule->start > start ? rule->start : start,
                rule->end < end ? rule->end : end, shift);
        }
        merge(all, kept, arrived);
    } else {
        /* Out of memory: without rules, all faults are forwarded to Python. */
        uffdaemon_table_free(all);
        all = NULL;
    }
    uffdaemon_table_free(rest);
    uffdaemon_table_free(kept);
    uffdaemon_table_free(arrived);
    uffdaemon_table_replace(&port->rules, all);
}

/* Whether an event's ranges are not empty and do not wrap.  Others are ignored. */
static int valid(const struct uffd_msg *message)
{
    uint64_t length = message->arg.remap.len;

    if (message->event == UFFD_EVENT_FORK)
        return 1;
    if (message->event == UFFD_EVENT_REMAP)
        return length && message->arg.remap.from <= UINT64_MAX - length &&
               message->arg.remap.to <= UINT64_MAX - length;
    return message->arg.remove.start < message->arg.remove.end;
}

/* Applies the event of a record, and stores the outcome in it.  Returns whether the page books now
 * tell all that it changed.  Under `change`, outside any read-side section. */
int uffdaemon_apply_event(struct uffdaemon_port *port, struct uffdaemon_record *record)
{
    const struct uffd_msg *message = &record->message;
    const struct uffdaemon_table *table = uffdaemon_table_load(&port->rules);
    uint64_t number;
    int booked = 0;

    switch (table && valid(message) ? message->event : 0) {
    case UFFD_EVENT_REMOVE:
        booked = removed(table, message->arg.remove.start, message->arg.remove.end,
                         released(port, message->arg.remove.start, message->arg.remove.end)
                             ? uffdaemon_pages_empty
                             : uffdaemon_pages_discard);
        break;
    case UFFD_EVENT_UNMAP:
        moved(port, message->arg.remove.start, message->arg.remove.end, 0, 0);
        break;
    case UFFD_EVENT_REMAP:
        moved(port, message->arg.remap.from, message->arg.remap.from + message->arg.remap.len, 1,
              message->arg.remap.to - message->arg.remap.from);
        break;
    case UFFD_EVENT_FORK:
        record->done = (uint64_t)(uintptr_t)uffdaemon_snapshot_new(table);
        break;
    default:
        break;
    }
    record->present = table ? UFFDAEMON_APPLIED : UFFDAEMON_APPLIED_NOWHERE;
    number = atomic_load_explicit(&port->events, memory_order_relaxed) + 1;
    port->discards[number % UFFDAEMON_DISCARDS].start = message->arg.remove.start;
    port->discards[number % UFFDAEMON_DISCARDS].end = message->arg.remove.end;
    if (message->event != UFFD_EVENT_REMOVE)
        port->rearranged = number;
    else if (!booked)
        port->unbooked = number;
    atomic_store_explicit(&port->events, number, memory_order_release);
    return booked;
}

/* Applies the event of a message.  Returns whether the journal has to keep it. */
static int apply(struct uffdaemon_port *port, struct uffdaemon_record *record, size_t index)
{
    uint64_t place;
    int books_tell;

    if (!port->journal) {
        uffdaemon_apply_event(port, record);
        return 0;
    }
    place = uffdaemon_journal_place(port->journal, index);
    if (record->message.event == UFFD_EVENT_FORK)
        uffdaemon_journal_keep_child(port->journal, place, (int)record->message.arg.fork.ufd);
    books_tell = uffdaemon_apply_event(port, record);
    if (record->message.event == UFFD_EVENT_FORK)
        uffdaemon_journal_keep_books(port->journal, place, uffdaemon_record_snapshot(record));
    record->error = books_tell ? 0 : place;
    return !books_tell;
}

/* Applies and removes the events of a batch.  Returns how many faults are left. */
UFFDAEMON_COLD size_t uffdaemon_handle_events(struct uffdaemon_port *port, size_t count,
                                              uint64_t now)
{
    size_t faults = 0, keep = 0;

    for (size_t index = 0; index < count; index++) {
        struct uffdaemon_record record = port->batch[index];

        if (record.message.event == UFFD_EVENT_PAGEFAULT) {
            port->batch[faults++] = record;
            continue;
        }
        if (apply(port, &record, index))
            keep = index + 1;
        uffdaemon_queue_push(&port->queue, &record, now);
        uffdaemon_port_notify(port);
    }
    if (port->journal)
        uffdaemon_journal_keep(port->journal, count, keep);
    return faults;
}
