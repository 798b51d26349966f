/* Bytes in place of what a userfaultfd would say, served by arbitrary rules and answered by a kernel
 * of the input's choosing.  The first half is messages, the rest rules and results. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fuzz.h"

#define REGIONS 3
#define PAGES 40u
#define LIMIT 8192u

/* Rules for a few regions side by side; returns how many. */
static size_t make_rules(struct input *input, struct uffdaemon_rule *rules,
                         struct uffdaemon_pages **books)
{
    static const uint64_t codes[] = {
        0, _UFFDIO_COPY, _UFFDIO_ZEROPAGE, _UFFDIO_MOVE, _UFFDIO_CONTINUE, _UFFDIO_POISON};
    size_t count = 0;

    for (unsigned kind = 0; kind < 2; kind++)
        for (unsigned region = 0; region < REGIONS; region++) {
            uint64_t size = region == 2 ? 512 * FUZZ_PAGE : FUZZ_PAGE;
            uint64_t origin = FUZZ_BASE + region * (UINT64_C(64) << 21), page = 0;

            while (page < PAGES && count < 64) {
                uint64_t first = page + take_bytes(input, 1) % 4;
                uint64_t end = first + 1 + take_bytes(input, 1) % PAGES;
                uint64_t choice = take_bytes(input, 1);
                struct uffdaemon_rule *rule = &rules[count];

                end = end > PAGES ? PAGES : end;
                page = end;
                if (first >= end)
                    continue;
                *rule = (struct uffdaemon_rule){
                    .kind = kind ? UFFD_PAGEFAULT_FLAG_MINOR : 0,
                    .start = origin + first * size,
                    .end = origin + end * size,
                    .code = codes[choice % 6],
                    .origin = origin,
                    .page_size = size,
                    .window = size * (1 + take_bytes(input, 1) % 50),
                    .pages = choice & 128 ? (uint64_t)(uintptr_t)books[region] : 0,
                    .zeros = choice >> 4 & 3,
                    .refusal = choice & 64 ? _UFFDIO_POISON : 0,
                };
                if (rule->code == _UFFDIO_COPY || rule->code == _UFFDIO_MOVE)
                    rule->src = UINT64_C(0x700000000000) + first * size;
                count++;
            }
        }
    return count;
}

/* Messages as they are, or made of fewer bytes: (what, page, more). */
static size_t make_messages(struct input *input, size_t until, struct uffd_msg *messages)
{
    static const uint8_t events[] = {UFFD_EVENT_PAGEFAULT,
                                     UFFD_EVENT_PAGEFAULT,
                                     UFFD_EVENT_REMOVE,
                                     UFFD_EVENT_UNMAP,
                                     UFFD_EVENT_REMAP,
                                     UFFD_EVENT_FORK,
                                     0};
    size_t count = 0;

    memset(messages, 0, LIMIT);
    while (input->left > until && count < LIMIT / 32) {
        struct uffd_msg *message = &messages[count++];
        uint64_t what = take_bytes(input, 1), page, other;

        if (what >= 0xf0) {
            for (size_t byte = 0; byte < sizeof(*message); byte++)
                ((uint8_t *)message)[byte] = (uint8_t)take_bytes(input, 1);
            continue;
        }
        page = take_bytes(input, 1);
        other = take_bytes(input, 1);
        message->event = events[what % 7];
        if (message->event == UFFD_EVENT_PAGEFAULT) {
            message->arg.pagefault.address = FUZZ_BASE + page / 80 * (UINT64_C(64) << 21) +
                                             page % 80 * (page / 80 == 2 ? 512 : 1) * FUZZ_PAGE +
                                             other;
            message->arg.pagefault.flags = what >> 4 & 5;
        } else {
            message->arg.remap.from = FUZZ_BASE + page * FUZZ_PAGE;
            message->arg.remap.to = FUZZ_BASE + (page + other) * FUZZ_PAGE;
            message->arg.remap.len = (1 + other % 16) * FUZZ_PAGE;
        }
    }
    return count;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct uffd_msg messages[LIMIT / 32];
    struct uffdaemon_rule rules[64];
    struct uffdaemon_record records[64];
    struct uffd_msg seen[16];
    struct input input = {data, size};
    struct uffdaemon_pages *books[REGIONS];
    uint64_t options = take_bytes(&input, 1);
    uint64_t events = 0, forwarded = 0, answered = 0;
    struct pollfd unread = {.events = POLLIN};
    size_t count;
    int ends[2], notify = options & 1 ? eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) : -1;
    long more;

    for (unsigned index = 0; index < REGIONS; index++) {
        uint64_t filled = take_bytes(&input, 4), discarded = take_bytes(&input, 4);

        books[index] = uffdaemon_pages_new(PAGES);
        for (unsigned page = 0; page < 32; page++) {
            if (filled >> page & 1)
                uffdaemon_pages_fill(books[index], page, page + 1);
            if (discarded >> page & 1)
                uffdaemon_pages_discard(books[index], page, page + 1);
        }
    }
    fuzz_expect(!pipe2(ends, O_NONBLOCK | O_CLOEXEC), "pipe");
    unread.fd = ends[0];
    fuzz_port = uffdaemon_port_new(ends[0], options >> 1 & 3, notify);
    fuzz_port->record_all = options >> 3 & 1;
    count = make_messages(&input, size / 2, messages);
    fuzz_expect(write(ends[1], messages, count * sizeof(messages[0])) ==
                    (ssize_t)(count * sizeof(messages[0])),
                "write");
    fuzz_expect(!uffdaemon_port_publish(fuzz_port, rules, make_rules(&input, rules, books), 0),
                "publish");
    fuzz_kernel = &input;
    for (unsigned round = 0; round < 1000; round++) {
        int again = uffdaemon_serve(fuzz_port);

        if (round == 1 && options & 16)
            uffdaemon_port_withdraw(fuzz_port);
        uffdaemon_queue_pending(&fuzz_port->queue, seen, 16);
        for (more = 64; more == 64;) {
            more = uffdaemon_port_dequeue(fuzz_port, records, 64);
            for (long index = 0; index < more; index++) {
                int fault = records[index].message.event == UFFD_EVENT_PAGEFAULT;

                uffdaemon_snapshot_free(uffdaemon_record_snapshot(&records[index]));
                events += !fault;
                forwarded += fault && !records[index].code;
            }
        }
        if (!again && !fuzz_port->postponed && poll(&unread, 1, 0) == 0)
            break;
    }
    /* Nothing is lost: each message comes out, or is a fault that was answered. */
    for (unsigned flags = 0; flags < UFFDAEMON_KINDS; flags++)
        for (unsigned code = 0; code < UFFDAEMON_CODES; code++)
            if (code != UFFDAEMON_DEFERRED)
                answered += fuzz_port->counts[flags][code];
    for (size_t index = 0; index < count; index++)
        if (messages[index].event == UFFD_EVENT_PAGEFAULT)
            forwarded--;
        else
            events--;
    fuzz_expect(events == 0, "an event was lost");
    fuzz_expect(forwarded + answered == 0, "a fault was lost, or answered twice");
    fuzz_kernel = NULL;
    uffdaemon_port_free(fuzz_port);
    for (unsigned index = 0; index < REGIONS; index++)
        uffdaemon_pages_put(books[index]);
    close(ends[0]);
    close(ends[1]);
    if (notify >= 0)
        close(notify);
    return 0;
}
