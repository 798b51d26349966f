/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Resolving faults by rules: what a plain policy would decide, without calling it.
 *
 * A batch of faults is sorted by address; neighbours under one rule are merged into one operation.
 * A fault without a rule, or whose rule fails, is forwarded to Python: its record keeps code 0.
 */
#include "rules.h"

#include <errno.h>

#include "base.h"
#include "operations.h"
#include "pages.h"
#include "table.h"
#include "window.h"

#define MAX_MERGED (2ULL << 20)

static const struct uffd_msg *message_of(const struct uffdaemon_record *record)
{
    return &record->message;
}

static uint64_t address_of(const struct uffdaemon_record *record)
{
    return message_of(record)->arg.pagefault.address;
}

static uint64_t kind_of(const struct uffdaemon_record *record)
{
    return message_of(record)->arg.pagefault.flags & ~(uint64_t)UFFD_PAGEFAULT_FLAG_WRITE;
}

static const struct uffdaemon_rule *rule_of(const struct uffdaemon_table *table,
                                            const struct uffdaemon_record *record)
{
    const struct uffdaemon_rule *rule = uffdaemon_table_find(table, kind_of(record),
                                                             address_of(record));
    return rule && rule->code ? rule : NULL;
}

static void mark_present(const struct uffdaemon_rule *rule, uint64_t start, uint64_t length)
{
    if (rule->pages)
        uffdaemon_pages_fill(uffdaemon_rule_pages(rule), page_at(rule, start),
                             page_at(rule, start + length));
}

static void sort(struct uffdaemon_record *records, size_t count)
{
    for (size_t index = 1; index < count; index++) {
        struct uffdaemon_record record = records[index];
        size_t at = index;
        for (; at && address_of(&records[at - 1]) > address_of(&record); at--)
            records[at] = records[at - 1];
        records[at] = record;
    }
}

static unsigned bucket(uint64_t latency)
{
    return latency ? 64u - (unsigned)__builtin_clzll(latency) : 0;
}

/* Only the serving thread counts; with in-thread handling, each faulting thread, too. */
static inline void count(struct uffdaemon_port *port, uint64_t *counter, uint64_t by)
{
    if (atomic_load_explicit(&port->in_thread, memory_order_relaxed))
        __atomic_fetch_add(counter, by, __ATOMIC_RELAXED);
    else
        __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + by,
                         __ATOMIC_RELAXED);
}

/* Records the outcome of an operation for `number` faults: page states, counters and records. */
static UFFDAEMON_HOT void finish(struct uffdaemon_port *port, const struct uffdaemon_rule *rule,
                                 const struct uffdaemon_operation *operation,
                                 struct uffdaemon_record *records, size_t number)
{
    uint64_t reached = operation->dst + operation->done + operation->present;
    uint64_t now = uffdaemon_now();
    uint64_t done = operation->done;

    mark_present(rule, operation->dst, operation->done + operation->present);
    if (done)
        count(port, &port->bytes[operation->code], done);
    for (size_t index = 0; index < number; index++) {
        struct uffdaemon_record *record = &records[index];
        unsigned flags = message_of(record)->arg.pagefault.flags & (UFFDAEMON_KINDS - 1);

        if (address_of(record) >= reached) {
            record->error = operation->error;
            continue;
        }
        record->code = operation->code;
        record->latency = now - record->latency;
        record->done = done;
        done = 0;
        count(port, &port->counts[flags][record->present ? 0 : operation->code], 1);
        count(port, &port->latencies[bucket(record->latency) & (UFFDAEMON_BUCKETS - 1)], 1);
    }
}

/* The rule's operation for a range; with `zeros`, the one that fills it with zeros. */
static inline void plan(const struct uffdaemon_rule *rule, uint64_t from, uint64_t to, int zeros,
                        struct uffdaemon_operation *operation)
{
    operation->dst = from;
    operation->length = to - from;
    operation->page_size = rule->page_size;
    operation->mode = rule->mode; /* zeros are protected as other contents are */
    if (zeros) {
        operation->code = rule->zeros == 1 ? _UFFDIO_ZEROPAGE : _UFFDIO_COPY;
        operation->src = rule->zeros == 1 ? 0 : rule->zeros;
        return;
    }
    operation->code = (uint32_t)rule->code;
    operation->src = rule->src ? rule->src + (from - rule->start) : 0;
    /* EEXIST of a MOVE may be due to a marker, where waking does not help: forwarded to Python. */
    if (rule->code == _UFFDIO_MOVE)
        operation->page_size = 0;
}

/* Fills a part of a window for which no fault was read. */
static void fill_along(struct uffdaemon_port *port, const struct uffdaemon_rule *rule,
                       uint64_t from, uint64_t to)
{
    struct uffdaemon_operation operation;

    if (from == to)
        return;
    plan(rule, from, to, 0, &operation);
    uffdaemon_carry_out(port->fd, &operation, NULL, 0);
    finish(port, rule, &operation, NULL, 0);
}

/* Resolves the fault of a page that the book has as present.  If it is there, the fault was read
 * after a neighbour's window had been filled, and the thread is woken.  If not, the kernel has
 * dropped it without an event, and perhaps its neighbours: the window is filled again. */
static UFFDAEMON_COLD void refill(struct uffdaemon_port *port, const struct uffdaemon_rule *rule,
                                  struct uffdaemon_record *record)
{
    struct uffdaemon_operation operation;
    uint64_t page = address_of(record) & ~(rule->page_size - 1);
    uint64_t from = page, end = page + rule->page_size, to = end;

    plan(rule, page, end, 0, &operation);
    operation.mode |= UFFDIO_COPY_MODE_DONTWAKE; /* the same bit for each operation */
    uffdaemon_carry_out(port->fd, &operation, record, 1);
    finish(port, rule, &operation, record, 1);
    if (operation.error)
        return;
    if (operation.done) {
        widen(rule, 1, &from, &to);
        fill_along(port, rule, from, page);
        fill_along(port, rule, end, to);
    }
    plan(rule, page, end, 0, &operation);
    operation.code = _UFFDIO_WAKE;
    uffdaemon_execute(port->fd, &operation, 1);
}

/* Retries a fault alone.  If its own page fails, and not a neighbour or because of a pending event,
 * issues the rule's operation for unavailable contents.  The record keeps the error. */
static UFFDAEMON_COLD void refuse(struct uffdaemon_port *port, const struct uffdaemon_rule *rule,
                                  struct uffdaemon_record *record)
{
    struct uffdaemon_operation operation;
    uint64_t page = address_of(record) & ~(rule->page_size - 1);
    uint64_t error;

    plan(rule, page, page + rule->page_size, needs_zeros(rule, page), &operation);
    uffdaemon_carry_out(port->fd, &operation, record, 1);
    if (operation.error) {
        error = operation.error;
        /* Of these, the contents are available: it is tried again. */
        if (error == EAGAIN || error == ESRCH || error == ENOMEM || error == EEXIST) {
            record->error = error;
            return;
        }
        operation.code = (uint32_t)rule->refusal;
        operation.src = operation.mode = 0;
        uffdaemon_carry_out(port->fd, &operation, record, 1);
        finish(port, rule, &operation, record, 1);
        record->error = error;
        return;
    }
    finish(port, rule, &operation, record, 1);
}

/* Resolves those of `number` page faults that rules cover, and sets the code of their records.
 * Sorts the records by address. */
UFFDAEMON_HOT void uffdaemon_resolve(struct uffdaemon_port *port,
                                     const struct uffdaemon_table *table,
                                     struct uffdaemon_record *records, size_t number)
{
    size_t first = 0;

    sort(records, number);
    while (first < number) {
        const struct uffdaemon_rule *rule = rule_of(table, &records[first]);
        struct uffdaemon_operation operation;
        uint64_t from, to, next_from, next_to;
        size_t end = first + 1;
        int zeros;

        if (!rule) {
            first++;
            continue;
        }
        if (window(rule, address_of(&records[first]), &from, &to)) {
            refill(port, rule, &records[first]);
            if (!records[first].code && rule->refusal)
                refuse(port, rule, &records[first]);
            first++;
            continue;
        }
        zeros = needs_zeros(rule, from);
        for (; end < number && rule_of(table, &records[end]) == rule; end++) {
            if (window(rule, address_of(&records[end]), &next_from, &next_to) || next_from > to ||
                next_to - from > MAX_MERGED)
                break;
            /* A page of zeros is filled alone, for all faults on it. */
            if (next_from != from && (zeros || needs_zeros(rule, next_from)))
                break;
            if (next_to > to)
                to = next_to;
        }
        plan(rule, from, to, zeros, &operation);
        uffdaemon_carry_out(port->fd, &operation, &records[first], end - first);
        finish(port, rule, &operation, &records[first], end - first);
        for (; first < end; first++)
            if (!records[first].code && rule->refusal)
                refuse(port, rule, &records[first]);
    }
}
