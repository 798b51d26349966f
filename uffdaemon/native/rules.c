/*
 * Answering faults by rules: what a plain policy would decide, without asking it.
 *
 * A batch of faults is sorted by address; neighbours under one rule are merged into one operation.
 * What no rule covers, and what a rule could not do, is left to Python: its record keeps code 0.
 */
#include "native.h"

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

/* The rule for a fault, or NULL: a binary search by (kind, start). */
static const struct uffdaemon_rule *find(const struct uffdaemon_port *port,
                                   const struct uffdaemon_record *record)
{
    const struct uffdaemon_rule *rules = (const void *)(uintptr_t)port->rules;
    uint64_t kind = kind_of(record), address = address_of(record);
    size_t low = 0, high = port->rule_count;

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

static int present(const struct uffdaemon_rule *rule, uint64_t page)
{
    const unsigned char *bits = (const void *)(uintptr_t)rule->pages;
    return bits[page >> 3] >> (page & 7) & 1;
}

static void mark_present(const struct uffdaemon_rule *rule, uint64_t start, uint64_t length)
{
    unsigned char *bits = (void *)(uintptr_t)rule->pages;
    uint64_t page = (start - rule->origin) / rule->page_size;
    uint64_t end = page + length / rule->page_size;

    for (; page < end; page++)
        bits[page >> 3] |= (unsigned char)(1u << (page & 7));
}

/* What to fill for one fault: the aligned window around it, cut to the rule and to the run of
 * pages that are not known to be there.  (from, to) in bytes. */
static void window(const struct uffdaemon_rule *rule, uint64_t address, uint64_t *from,
                   uint64_t *to)
{
    uint64_t size = rule->page_size;
    uint64_t page = address & ~(size - 1);
    uint64_t offset = page - rule->origin;
    uint64_t low = rule->origin + offset - offset % rule->window;
    uint64_t high = low + rule->window;

    if (low < rule->start)
        low = rule->start;
    if (high > rule->end)
        high = rule->end;
    *from = page;
    *to = page + size;
    while (*from > low && !present(rule, (*from - size - rule->origin) / size))
        *from -= size;
    while (*to < high && !present(rule, (*to - rule->origin) / size))
        *to += size;
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

/* Books one operation that answered `count` faults, as far as it came. */
static void book(struct uffdaemon_port *port, const struct uffdaemon_rule *rule,
                 const struct uffdaemon_operation *operation, struct uffdaemon_record *records,
                 size_t count, uint64_t read_at)
{
    uint64_t reached = operation->dst + operation->done + operation->present;
    uint64_t latency = uffdaemon_now() - read_at;
    uint64_t done = operation->done;

    mark_present(rule, operation->dst, operation->done + operation->present);
    port->bytes[operation->code] += done;
    for (size_t index = 0; index < count; index++) {
        struct uffdaemon_record *record = &records[index];
        unsigned flags = message_of(record)->arg.pagefault.flags & (UFFDAEMON_KINDS - 1);

        if (address_of(record) >= reached)
            continue;
        record->code = operation->code;
        record->latency = latency;
        record->done = done;
        done = 0;
        port->counts[flags][record->present ? 0 : operation->code]++;
        port->latencies[bucket(latency) & (UFFDAEMON_BUCKETS - 1)]++;
    }
}

/* Answers what rules cover of `count` page faults, and sets the code of those records.  They come
 * back in the order of their addresses. */
void uffdaemon_answer(struct uffdaemon_port *port, struct uffdaemon_record *records, size_t count,
                      uint64_t read_at)
{
    size_t first = 0;

    sort(records, count);
    while (first < count) {
        const struct uffdaemon_rule *rule = find(port, &records[first]);
        struct uffdaemon_operation operation = {0};
        uint64_t from, to, next_from, next_to;
        size_t end = first + 1;

        if (!rule) {
            first++;
            continue;
        }
        window(rule, address_of(&records[first]), &from, &to);
        for (; end < count && find(port, &records[end]) == rule; end++) {
            window(rule, address_of(&records[end]), &next_from, &next_to);
            if (next_from > to || next_to - from > MAX_MERGED)
                break;
            if (next_to > to)
                to = next_to;
        }
        operation.code = (uint32_t)rule->code;
        operation.dst = from;
        operation.src = rule->src ? rule->src + (from - rule->start) : 0;
        operation.length = to - from;
        operation.mode = rule->mode;
        /* What is in the way of a MOVE may be a marker, which no wake-up helps against: Python's. */
        operation.page_size = rule->code == _UFFDIO_MOVE ? 0 : rule->page_size;
        uffdaemon_carry_out(port->fd, &operation, &records[first], end - first);
        book(port, rule, &operation, &records[first], end - first, read_at);
        first = end;
    }
}
