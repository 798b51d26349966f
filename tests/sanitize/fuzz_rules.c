/* Sequences of events against rules, compared with a model that keeps books page by page. */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

#define PAGES 96u /* of the model's address space */
#define REGIONS 2u
#define REGION 48u /* pages */
#define KINDS 2u
#define SOURCE UINT64_C(0x700000000000)

/* What one kind of fault at one page is answered with. */
struct place {
    struct uffdaemon_pages *pages; /* NULL: by nobody */
    uint64_t number, code, src;    /* number: of the page in its region */
};

struct model {
    struct place places[KINDS][PAGES];
    struct uffdaemon_pages *books[REGIONS];
    uint8_t removed[REGIONS][REGION]; /* whether the bits are to say so */
    uint8_t present[REGIONS][REGION];
};

static size_t make_rules(struct input *input, struct model *model, struct uffdaemon_rule *rules)
{
    size_t count = 0;

    for (unsigned kind = 0; kind < KINDS; kind++)
        for (uint64_t page = 0; page < REGIONS * REGION && count < 64;) {
            uint64_t region = page / REGION, first = page + take_bytes(input, 1) % 3;
            uint64_t end = first + 1 + take_bytes(input, 1) % 24, limit = (region + 1) * REGION;
            struct uffdaemon_rule *rule = &rules[count];

            end = end > limit ? limit : end;
            page = end;
            if (first >= end)
                continue;
            *rule = (struct uffdaemon_rule){
                .kind = kind ? UFFD_PAGEFAULT_FLAG_MINOR : 0,
                .start = FUZZ_BASE + first * FUZZ_PAGE,
                .end = FUZZ_BASE + end * FUZZ_PAGE,
                .code = take_bytes(input, 1) % 2 ? _UFFDIO_COPY : 0,
                .src = SOURCE + first * FUZZ_PAGE,
                .origin = FUZZ_BASE + region * REGION * FUZZ_PAGE,
                .page_size = FUZZ_PAGE,
                .window = FUZZ_PAGE,
                .pages = (uint64_t)(uintptr_t)model->books[region],
            };
            for (uint64_t each = first; each < end; each++)
                model->places[kind][each] = (struct place){model->books[region],
                                                           each - region * REGION, rule->code,
                                                           SOURCE + each * FUZZ_PAGE};
            count++;
        }
    return count;
}

static void remove_in_model(struct model *model, uint64_t start, uint64_t end)
{
    for (unsigned kind = 0; kind < KINDS; kind++)
        for (unsigned page = 0; page < PAGES; page++) {
            const struct place *place = &model->places[kind][page];
            uint64_t at = FUZZ_BASE + page * FUZZ_PAGE;

            if (!place->pages || end <= at || start >= at + FUZZ_PAGE || start >= end)
                continue;
            for (unsigned region = 0; region < REGIONS; region++)
                if (place->pages == model->books[region]) {
                    model->removed[region][place->number] = 1;
                    model->present[region][place->number] = 0;
                }
        }
}

/* Of whole pages.  Places that leave the model's address space are forgotten. */
static void move_in_model(struct model *model, uint64_t from, uint64_t count, uint64_t to,
                          int moves)
{
    struct place old[KINDS][PAGES];

    memcpy(old, model->places, sizeof(old));
    for (unsigned kind = 0; kind < KINDS; kind++) {
        for (uint64_t page = 0; page < count; page++) {
            if (from + page < PAGES)
                model->places[kind][from + page].pages = NULL;
            if (moves && to + page < PAGES)
                model->places[kind][to + page].pages = NULL;
        }
        for (uint64_t page = 0; moves && page < count; page++)
            if (from + page < PAGES && to + page < PAGES)
                model->places[kind][to + page] = old[kind][from + page];
    }
}

static void check_order(const struct uffdaemon_table *table)
{
    for (size_t index = 0; table && index < table->count; index++) {
        const struct uffdaemon_rule *rule = &table->rules[index], *before = rule - 1;

        fuzz_expect(rule->start < rule->end, "a rule for nothing");
        if (index)
            fuzz_expect(before->kind < rule->kind ||
                            (before->kind == rule->kind && before->end <= rule->start),
                        "rules overlap, or are out of order");
    }
}

static void compare(const struct model *model, const struct uffdaemon_table *table)
{
    for (unsigned kind = 0; kind < KINDS; kind++)
        for (unsigned page = 0; page < PAGES; page++) {
            const struct place *place = &model->places[kind][page];
            uint64_t at = FUZZ_BASE + page * FUZZ_PAGE;
            const struct uffdaemon_rule *rule = table
                                                    ? uffdaemon_table_find(
                                                          table,
                                                          kind ? UFFD_PAGEFAULT_FLAG_MINOR : 0, at)
                                                    : NULL;

            fuzz_expect((rule != NULL) == (place->pages != NULL), "a rule is missing, or left");
            if (!rule)
                continue;
            fuzz_expect(rule->pages == (uint64_t)(uintptr_t)place->pages, "of another region");
            fuzz_expect(rule->code == place->code, "with another code");
            fuzz_expect(rule->src + (at - rule->start) == place->src, "from another source");
            fuzz_expect((at - rule->origin) / FUZZ_PAGE == place->number, "for another page");
        }
    for (unsigned region = 0; region < REGIONS; region++)
        for (unsigned page = 0; page < REGION; page++) {
            enum uffdaemon_page_state state = uffdaemon_pages_state(model->books[region], page);

            fuzz_expect((state & UFFDAEMON_PAGE_CLEAN) == model->present[region][page],
                        "a page is thought to be there, or not to be");
            fuzz_expect(!(state & UFFDAEMON_PAGE_DISCARDED) == !model->removed[region][page],
                        "a page is thought to be discarded, or not to be");
        }
}

static void apply(const struct uffd_msg *message)
{
    struct uffdaemon_record record = {.message = *message};

    uffdaemon_apply_event(fuzz_port, &record);
    uffdaemon_snapshot_free(uffdaemon_record_snapshot(&record));
}

/* One event, of whole pages near the rules, or of any numbers.  Returns whether the model knows what
 * becomes of it. */
static int change(struct input *input, struct model *model)
{
    static const uint8_t events[] = {UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP, UFFD_EVENT_REMAP,
                                     UFFD_EVENT_FORK};
    uint64_t what = take_bytes(input, 1), from, count, to;
    struct uffd_msg message = {.event = events[what % 4]};
    int moves = message.event == UFFD_EVENT_REMAP;

    if (what >= 0xe0) {
        message.arg.remap.from = take_bytes(input, 8);
        message.arg.remap.to = take_bytes(input, 8);
        message.arg.remap.len = take_bytes(input, 8);
        apply(&message);
        return 0;
    }
    from = take_bytes(input, 1) % PAGES;
    count = take_bytes(input, 1) % (PAGES - from + 1);
    to = take_bytes(input, 1) % (2 * PAGES); /* a half of which the model does not see */
    if (to >= PAGES)
        to = UINT64_C(1) << 24;
    if (moves && to < PAGES && to + count > PAGES)
        count = PAGES - to;
    message.arg.remap.from = FUZZ_BASE + from * FUZZ_PAGE;
    message.arg.remap.to = FUZZ_BASE + (moves ? to : from + count) * FUZZ_PAGE;
    message.arg.remap.len = count * FUZZ_PAGE;
    apply(&message);
    if (message.event == UFFD_EVENT_REMOVE)
        remove_in_model(model, message.arg.remove.start, message.arg.remove.end);
    else if (message.event != UFFD_EVENT_FORK)
        move_in_model(model, from, count, to, moves);
    return 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct uffdaemon_rule rules[64];
    struct model model;
    struct input input = {data, size};
    int known = 1;

    memset(&model, 0, sizeof(model));
    for (unsigned index = 0; index < REGIONS; index++) {
        model.books[index] = uffdaemon_pages_new(REGION);
        uffdaemon_pages_fill(model.books[index], 0, REGION);
    }
    memset(model.present, 1, sizeof(model.present));
    fuzz_port = uffdaemon_port_new(-1, 0, -1);
    fuzz_expect(!uffdaemon_port_publish(fuzz_port, rules, make_rules(&input, &model, rules), 0),
                "publish");
    for (unsigned round = 0; input.left && round < 200; round++) {
        known &= change(&input, &model);
        check_order(fuzz_port->rules.table);
        if (known)
            compare(&model, fuzz_port->rules.table);
        if (fuzz_port->rules.table && fuzz_port->rules.table->count > 1000)
            break;
    }
    uffdaemon_port_free(fuzz_port);
    for (unsigned index = 0; index < REGIONS; index++)
        uffdaemon_pages_put(model.books[index]);
    return 0;
}
