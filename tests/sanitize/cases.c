/* Races that were found, each brought about for certain: `cases NAME`. */
#include "stress.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static struct uffdaemon_port *port;
static struct uffdaemon_resolver *resolver;
static struct uffdaemon_pages *pages;
static uint64_t start;
static char *source;
static uint32_t done, held; /* held: 1: the next COPY is to be held, 2: it is, 0: it may go on */
static __thread sigjmp_buf *volatile escape;

int __real_ioctl(int fd, unsigned long request, void *argument);
int __wrap_ioctl(int fd, unsigned long request, void *argument);

int __wrap_ioctl(int fd, unsigned long request, void *argument)
{
    uint32_t one = 1;

    if (request == UFFDIO_COPY &&
        __atomic_compare_exchange_n(&held, &one, 2, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        while (__atomic_load_n(&held, __ATOMIC_SEQ_CST))
            sched_yield();
    return __real_ioctl(fd, request, argument);
}

static void expect(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "cases: %s\n", what);
        _exit(1);
    }
}

static uint32_t load(uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)info;
    (void)context;
    expect(escape != NULL, "a signal out of place");
    siglongjmp(*escape, 1);
}

/* The first byte of a page, or -1: SIGBUS came of it. */
static int byte_of(unsigned page)
{
    sigjmp_buf here;
    int byte;

    if (sigsetjmp(here, 1)) {
        escape = NULL;
        return -1;
    }
    escape = &here;
    byte = *(volatile char *)(uintptr_t)(start + page * PAGE);
    escape = NULL;
    return byte;
}

static void *touch_first(void *result)
{
    *(int *)result = byte_of(0);
    __atomic_store_n(&done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

/* Sixteen pages that are guarded and served, and hold 'x'. */
static void guard(int in_thread)
{
    static const struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    uint64_t ioctls, features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_POISON |
                                (in_thread ? UFFD_FEATURE_SIGBUS : 0);
    int error, fd = uffdaemon_open_syscall(0);

    sigaction(SIGBUS, &action, NULL);
    expect(!uffdaemon_handshake(fd, &features, &ioctls), "UFFDIO_API");
    start = (uint64_t)(uintptr_t)mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    source = aligned_alloc(PAGE, 16 * PAGE);
    memset(source, 'x', 16 * PAGE);
    expect(!uffdaemon_register(fd, start, 16 * PAGE, UFFDIO_REGISTER_MODE_MISSING, &ioctls),
           "UFFDIO_REGISTER");
    pages = uffdaemon_pages_new(16);
    port = uffdaemon_port_new(fd, 0, eventfd(0, EFD_NONBLOCK));
    resolver = uffdaemon_resolver_start(&error);
    expect(resolver && !uffdaemon_resolver_add(resolver, port), "the resolver");
    expect(!in_thread || !uffdaemon_sigbus_add(port), "uffdaemon_sigbus_add");
}

static void publish_rule(uint64_t code, uint64_t events)
{
    struct uffdaemon_rule rule = {.start = start,
                                  .end = start + 16 * PAGE,
                                  .code = code,
                                  .src = code == _UFFDIO_COPY ? (uint64_t)(uintptr_t)source : 0,
                                  .origin = start,
                                  .page_size = PAGE,
                                  .window = PAGE,
                                  .pages = (uint64_t)(uintptr_t)pages,
                                  .zeros = 1};

    expect(!uffdaemon_port_publish(port, &rule, 1, events), "uffdaemon_port_publish");
}

static void discard_first(void)
{
    expect(!madvise((void *)(uintptr_t)start, PAGE, MADV_DONTNEED), "MADV_DONTNEED");
}

static void *wait_for_readers(void *readers)
{
    uffdaemon_synchronize(readers);
    __atomic_store_n(&done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void *wait_as_well(void *readers)
{
    uffdaemon_synchronize(readers);
    return NULL;
}

static void wait_for_epoch(struct uffdaemon_readers *readers, uint64_t epoch)
{
    while (atomic_load(&readers->epoch) < epoch && !load(&done))
        sched_yield();
}

/* Two wait at once, and turn the epoch for each other: neither may miss who is inside. */
static void two_wait_for_readers(void)
{
    static struct uffdaemon_readers readers;
    unsigned even = uffdaemon_read_lock(&readers), odd;
    pthread_t one, other;

    readers.epoch = 1;
    odd = uffdaemon_read_lock(&readers);
    readers.epoch = 2;
    pthread_create(&one, NULL, wait_for_readers, &readers);
    wait_for_epoch(&readers, 3);
    pthread_create(&other, NULL, wait_as_well, &readers);
    wait_for_epoch(&readers, 4);
    uffdaemon_read_unlock(&readers, even);
    wait_for_epoch(&readers, 6);
    expect(!load(&done), "who waited did not wait for everybody");
    uffdaemon_read_unlock(&readers, odd);
    pthread_join(one, NULL);
    pthread_join(other, NULL);
}

/* What is discarded while rules are withdrawn is known to those that come after. */
static void discarded_while_withdrawn(void)
{
    guard(0);
    publish_rule(_UFFDIO_COPY, 0);
    expect(byte_of(0) == 'x', "the page is not what it was to be");
    uffdaemon_port_withdraw(port);
    discard_first();
    publish_rule(_UFFDIO_COPY, 1);
    expect(byte_of(0) == 0, "a page that was discarded is not zeros");
    expect(byte_of(1) == 'x', "its neighbour is not what it was to be");
}

/* What is discarded is in the book once madvise(2) has returned, and stays there. */
static void discarded_and_noted(void)
{
    guard(0);
    publish_rule(_UFFDIO_COPY, 0);
    discard_first();
    uffdaemon_port_settle(port);
    expect(uffdaemon_pages_state(pages, 0) == UFFDAEMON_PAGE_DISCARDED,
           "what was discarded is not noted");
    expect(byte_of(0) == 0, "a page that was discarded is not zeros");
    expect(byte_of(1) == 'x', "its neighbour is not what it was to be");
    uffdaemon_port_settle(port); /* a thread runs on before its page is noted */
    uffdaemon_pages_void(pages, 0, 1);
    expect(uffdaemon_pages_state(pages, 0) == UFFDAEMON_PAGE_DIRTY, "an event was applied twice");
    expect(uffdaemon_pages_state(pages, 1) == UFFDAEMON_PAGE_CLEAN, "a page is not noted");
    expect(uffdaemon_pages_state(pages, 2) == UFFDAEMON_PAGE_ABSENT, "a page was made up");
}

static void expect_states(const struct uffdaemon_pages *book, uint64_t first, uint64_t end,
                          enum uffdaemon_page_state state)
{
    for (uint64_t page = first; page < end; page++)
        expect(uffdaemon_pages_state(book, page) == state, "a page is in another state");
}

static void *fill_even_pages(void *book)
{
    for (uint64_t page = 0; page < 20000; page += 2)
        uffdaemon_pages_fill(book, page, page + 1);
    return NULL;
}

static void *discard_odd_pages(void *book)
{
    for (uint64_t page = 1; page < 20000; page += 2)
        uffdaemon_pages_discard(book, page, page + 1);
    return NULL;
}

/* In each storage: borders of words, two threads at once, and copies that go their own way. */
static void states_of_pages(void)
{
    static const uint64_t borders[] = {0, 1, 31, 32, 33, 63, 64, 65, 200};
    int error;

    for (int kind = 0; kind < 3; kind++) {
        uint64_t count = kind ? 20000 : 200;
        int fd = kind == 2 ? memfd_create("pages", 0) : -1;
        struct uffdaemon_pages *book = kind == 2 ? uffdaemon_pages_map(fd, count, &error)
                                                 : uffdaemon_pages_new(count);
        struct uffdaemon_pages *other;
        pthread_t filler, discarder;

        for (unsigned low = 0; low < 9; low++)
            for (unsigned high = low; high < 9; high++) {
                uint64_t first = borders[low], end = borders[high];

                uffdaemon_pages_fill(book, first, end);
                expect_states(book, 0, first, UFFDAEMON_PAGE_ABSENT);
                expect_states(book, first, end, UFFDAEMON_PAGE_CLEAN);
                expect_states(book, end, 200, UFFDAEMON_PAGE_ABSENT);
                uffdaemon_pages_empty(book, first, end);
                expect_states(book, 0, 200, UFFDAEMON_PAGE_ABSENT);
            }
        pthread_create(&filler, NULL, fill_even_pages, book);
        pthread_create(&discarder, NULL, discard_odd_pages, book);
        pthread_join(filler, NULL);
        pthread_join(discarder, NULL);
        for (uint64_t page = 0; page < count; page++)
            expect_states(book, page, page + 1,
                          page & 1 ? UFFDAEMON_PAGE_DISCARDED : UFFDAEMON_PAGE_CLEAN);
        other = uffdaemon_pages_copy(book);
        uffdaemon_pages_discard(book, 0, count);
        uffdaemon_pages_fill(book, 0, 1);
        expect_states(book, 0, 1, UFFDAEMON_PAGE_DIRTY);
        expect_states(other, 0, 1, UFFDAEMON_PAGE_CLEAN);
        expect_states(other, 1, 2, UFFDAEMON_PAGE_DISCARDED);
        expect((other->fd >= 0) == (kind == 2), "a copy is in another storage");
        uffdaemon_pages_put(other);
        if (kind == 2) {
            other = uffdaemon_pages_map(fd, count, &error);
            expect_states(other, 0, 1, UFFDAEMON_PAGE_DIRTY);
            uffdaemon_pages_fill(other, 1, 2);
            expect_states(book, 1, 2, UFFDAEMON_PAGE_DIRTY);
            uffdaemon_pages_put(other);
            expect(!uffdaemon_pages_map(fd, count + 1, &error) && error == EINVAL,
                   "a file of another size was mapped");
            close(fd);
        }
        uffdaemon_pages_put(book);
    }
}

/* A FORK event carries the states as they were when it was read. */
static void forked_and_discarded(void)
{
    struct uffdaemon_record record = {.message = {.event = UFFD_EVENT_FORK}}, other;
    struct uffdaemon_snapshot *snapshot;
    struct uffdaemon_pages *copy;

    guard(0);
    publish_rule(_UFFDIO_COPY, 0);
    expect(byte_of(1) == 'x', "the page is not what it was to be");
    uffdaemon_lock(&port->change);
    uffdaemon_apply_event(port, &record);
    uffdaemon_unlock(&port->change);
    discard_first();
    snapshot = uffdaemon_record_snapshot(&record);
    expect(snapshot && record.present == UFFDAEMON_APPLIED, "no snapshot was taken");
    copy = uffdaemon_snapshot_take(snapshot, pages);
    expect_states(copy, 0, 1, UFFDAEMON_PAGE_ABSENT);
    expect_states(copy, 1, 2, UFFDAEMON_PAGE_CLEAN);
    expect(!uffdaemon_snapshot_take(snapshot, pages), "it was taken twice");
    expect(!uffdaemon_snapshot_take(snapshot, copy), "of somebody else");
    uffdaemon_pages_put(copy);
    uffdaemon_snapshot_free(snapshot);
    /* One that nobody dequeues goes with the port. */
    uffdaemon_resolver_remove(resolver, port);
    uffdaemon_apply_event(port, &record);
    uffdaemon_queue_push(&port->queue, &record, 1);
    uffdaemon_port_free(port);
    /* Without rules there is nothing to snapshot, and the event is Python's. */
    other = (struct uffdaemon_record){.message = {.event = UFFD_EVENT_FORK}};
    port = uffdaemon_port_new(-1, 0, -1);
    uffdaemon_apply_event(port, &other);
    expect(other.present == UFFDAEMON_APPLIED_NOWHERE && !other.done, "a snapshot of nothing");
    uffdaemon_port_free(port);
    uffdaemon_pages_put(pages);
}

static int cores_of_this_thread(void)
{
    cpu_set_t cores;

    expect(!sched_getaffinity(0, sizeof(cores), &cores), "sched_getaffinity");
    return CPU_COUNT(&cores);
}

static void seek_often(unsigned reads, uint64_t now)
{
    for (int fault = 0; fault < 64; fault++)
        uffdaemon_affinity_search(reads, now);
}

/* Where a fault comes after many reads, the core is another one's: all are tried, and then none for
 * a while; where it comes at once, the resolver stays. */
static void a_core_is_sought(void)
{
    int all = cores_of_this_thread();
    uint64_t now = 1;

    seek_often(0, now);
    expect(cores_of_this_thread() == all, "who is at the right place has moved");
    if (all == 1) {
        seek_often(50, now);
        return;
    }
    seek_often(50, now);
    expect(cores_of_this_thread() == 1, "no core was tried");
    seek_often(1, now);
    expect(cores_of_this_thread() == 1, "the right core was left");
    uffdaemon_affinity_give_up(now);
    expect(cores_of_this_thread() == all, "somebody else wants the core, and it was kept");
    seek_often(50, now);
    expect(cores_of_this_thread() == all, "a core was tried at once");
    now += 1000000000;
    for (int core = 0; core < all && core < 8; core++) {
        seek_often(50, now);
        expect(cores_of_this_thread() == 1, "not all cores were tried");
    }
    seek_often(50, now);
    expect(cores_of_this_thread() == all, "it was not given up");
}

/* The thread that faults waits, as for any rule that is Python's. */
static void withdrawn_in_thread(void)
{
    struct uffdaemon_operation operation = {.code = _UFFDIO_COPY, .length = PAGE};
    pthread_t toucher;
    int byte = 0;

    guard(1);
    publish_rule(_UFFDIO_COPY, 0);
    uffdaemon_port_withdraw(port);
    pthread_create(&toucher, NULL, touch_first, &byte);
    while (!atomic_load(&port->queue.count) && !load(&done))
        sched_yield();
    expect(!load(&done), "rules were withdrawn, and SIGBUS came of it");
    operation.dst = start;
    operation.src = (uint64_t)(uintptr_t)source;
    uffdaemon_port_execute(port, &operation, 1, 0);
    pthread_join(toucher, NULL);
    expect(byte == 'x', "the page is not what it was to be");
}

/* By a rule, beside a rule, and by Python: the access ends in SIGBUS each time. */
static void poisoned_in_thread(void)
{
    struct uffdaemon_operation operation = {.code = _UFFDIO_POISON, .length = PAGE};
    pthread_t toucher;
    int byte = 0;

    guard(1);
    publish_rule(_UFFDIO_POISON, 0);
    expect(byte_of(2) == -1, "poisoned by a rule");
    expect(byte_of(2) == -1, "poisoned by a rule before");
    publish_rule(0, 0);
    expect(byte_of(2) == -1, "poisoned by a rule that is Python's by now");
    pthread_create(&toucher, NULL, touch_first, &byte);
    while (!atomic_load(&port->queue.count))
        sched_yield();
    operation.dst = start;
    uffdaemon_port_execute(port, &operation, 1, 0);
    pthread_join(toucher, NULL);
    expect(byte == -1, "poisoned by Python");
    publish_rule(_UFFDIO_ZEROPAGE, 0);
    expect(byte_of(0) == -1, "poisoned by Python before");
    expect(byte_of(1) == 0, "its neighbour is not what it was to be");
}

static struct sigaction theirs;

static uint32_t faulted, removed;

static void on_bus_error_too_late(int number, siginfo_t *info, void *context)
{
    __atomic_store_n(&faulted, 1, __ATOMIC_SEQ_CST);
    while (!load(&removed))
        sched_yield();
    theirs.sa_sigaction(number, info, context);
}

static void *remove_once_it_has_faulted(void *unused)
{
    while (!load(&faulted))
        sched_yield();
    expect(!uffdaemon_unregister(port->fd, start, 16 * PAGE), "UFFDIO_UNREGISTER");
    expect(!uffdaemon_port_publish(port, NULL, 0, 0), "uffdaemon_port_publish");
    __atomic_store_n(&removed, 1, __ATOMIC_SEQ_CST);
    return unused;
}

/* The fault came while its page was watched, and the handler when nobody was at it any more. */
static void removed_in_between(void)
{
    struct sigaction late = {.sa_sigaction = on_bus_error_too_late, .sa_flags = SA_SIGINFO};
    pthread_t remover;

    guard(1);
    publish_rule(_UFFDIO_COPY, 0);
    sigaction(SIGBUS, &late, &theirs);
    pthread_create(&remover, NULL, remove_once_it_has_faulted, NULL);
    expect(byte_of(0) == 0, "memory that nobody watches is SIGBUS");
    pthread_join(remover, NULL);
}

/* The access is repeated once, and then is somebody else's. */
static void never_ours(void)
{
    guard(1);
    for (int times = 0; times < 3; times++)
        expect(byte_of(0) == -1, "memory without rules is not SIGBUS");
}

static void *discard_first_thread(void *unused)
{
    discard_first();
    __atomic_store_n(&done, 1, __ATOMIC_SEQ_CST);
    return unused;
}

/* A handler has decided on a copy; then the page is discarded, and is zeros from then on. */
static void discarded_while_answered(void)
{
    pthread_t toucher, owner;
    uint64_t epoch;
    int byte = 0;

    guard(1);
    publish_rule(_UFFDIO_COPY, 0);
    epoch = atomic_load(&port->rules.readers.epoch);
    held = 1;
    pthread_create(&toucher, NULL, touch_first, &byte);
    while (load(&held) != 2)
        sched_yield();
    pthread_create(&owner, NULL, discard_first_thread, NULL);
    /* It has gone on, or waits for the handler. */
    while (!load(&done) && atomic_load(&port->rules.readers.epoch) == epoch)
        sched_yield();
    __atomic_store_n(&held, 0, __ATOMIC_SEQ_CST);
    pthread_join(toucher, NULL);
    pthread_join(owner, NULL);
    expect(byte_of(0) == 0, "a page that was discarded holds what was decided on before");
}

/* Rules are being replaced: an event waits until they have been, however long that takes. */
static void discarded_while_published(void)
{
    const struct timespec longer_than_patience = {0, 100000000};
    pthread_t owner;

    guard(0);
    publish_rule(_UFFDIO_COPY, 0);
    uffdaemon_lock(&port->change);
    pthread_create(&owner, NULL, discard_first_thread, NULL);
    nanosleep(&longer_than_patience, NULL);
    expect(!atomic_load(&port->events), "an event was applied meanwhile");
    uffdaemon_unlock(&port->change);
    pthread_join(owner, NULL);
    expect(byte_of(0) == 0, "a page that was discarded is not zeros");
}

/* Takes `faults` after `events` of memory that was discarded; Python is at them from then on. */
static void take_turn(uint64_t events, uint64_t faults)
{
    static struct uffdaemon_record taken[128];
    uint64_t now = uffdaemon_now();

    for (uint64_t index = 0; index < events + faults; index++) {
        struct uffdaemon_record record = {.latency = now};

        record.message.event = index < events ? UFFD_EVENT_REMOVE : UFFD_EVENT_PAGEFAULT;
        record.message.arg.pagefault.address = start + index * PAGE;
        uffdaemon_queue_push(&port->queue, &record, now);
    }
    expect(uffdaemon_port_dequeue(port, taken, 128) == (long)(events + faults),
           "uffdaemon_port_dequeue");
}

/* Lines that the watchdog writes within a second; standard error is its own meanwhile. */
static int lines_of_a_second(void)
{
    static char text[1 << 20];
    const struct timespec second = {1, 0};
    int ends[2], kept = dup(2), lines = 0, error;
    struct uffdaemon_watch *watch;
    ssize_t length;

    expect(!pipe2(ends, O_NONBLOCK) && dup2(ends[1], 2) == 2, "pipe2");
    fcntl(ends[1], F_SETPIPE_SZ, (int)sizeof(text));
    watch = uffdaemon_watch_add(port->fd, port, 1000000, UFFDAEMON_REPORT, 0, "memory", &error);
    nanosleep(&second, NULL);
    uffdaemon_watch_remove(watch);
    dup2(kept, 2);
    length = read(ends[0], text, sizeof(text));
    for (ssize_t index = 0; index < length; index++)
        lines += text[index] == '\n';
    return lines;
}

/* A fault that Python is at is told of, although many events came before it. */
static void told_after_events(void)
{
    guard(0);
    take_turn(40, 1);
    expect(lines_of_a_second() == 1, "a fault that Python is at was not told of");
}

/* Nobody is told of twice, however many wait. */
static void told_once(void)
{
    uint64_t now = uffdaemon_now();

    guard(0);
    take_turn(0, 40);
    for (uint64_t index = 100; index < 140; index++) {
        struct uffdaemon_record record = {.latency = now};

        record.message.event = UFFD_EVENT_PAGEFAULT;
        record.message.arg.pagefault.address = start + index * PAGE;
        uffdaemon_queue_push(&port->queue, &record, now);
    }
    expect(lines_of_a_second() == 48, "not 16 that Python is at, and 32 that it has not taken");
}

/* A port whose records nobody dequeues is left alone for a while, and served again after that. */
static void paused_when_full(void)
{
    static struct uffdaemon_record taken[UFFDAEMON_FULL + 1];
    struct uffdaemon_record record = {.message = {.event = UFFD_EVENT_REMOVE}};
    struct uffdaemon_port *full = uffdaemon_port_new(-1, 0, eventfd(0, EFD_NONBLOCK));

    for (size_t index = 0; index < UFFDAEMON_FULL; index++)
        uffdaemon_queue_push(&full->queue, &record, 1);
    expect(uffdaemon_serve(full) == UFFDAEMON_SERVE_FULL, "it is not full");
    expect(uffdaemon_serve_slowly(full) == UFFDAEMON_SERVE_PAUSED, "it was not paused");
    expect(full->reads == 1, "not one message at a time");
    expect(uffdaemon_port_dequeue(full, taken, UFFDAEMON_FULL + 1) == UFFDAEMON_FULL, "lost");
    expect(uffdaemon_serve(full) == UFFDAEMON_SERVE_DONE && full->reads == 2, "it stays paused");
    close(full->notify);
    uffdaemon_port_free(full);
}

int main(int count, char **arguments)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {
        {"two-wait-for-readers", two_wait_for_readers},
        {"discarded-while-withdrawn", discarded_while_withdrawn},
        {"withdrawn-in-thread", withdrawn_in_thread},
        {"discarded-and-noted", discarded_and_noted},
        {"states-of-pages", states_of_pages},
        {"forked-and-discarded", forked_and_discarded},
        {"a-core-is-sought", a_core_is_sought},
        {"told-after-events", told_after_events},
        {"told-once", told_once},
        {"paused-when-full", paused_when_full},
        {"poisoned-in-thread", poisoned_in_thread},
        {"removed-in-between", removed_in_between},
        {"never-ours", never_ours},
        {"discarded-while-answered", discarded_while_answered},
        {"discarded-while-published", discarded_while_published},
    };

    for (size_t index = 0; count == 2 && index < sizeof(cases) / sizeof(cases[0]); index++)
        if (!strcmp(arguments[1], cases[index].name)) {
            cases[index].run();
            _exit(0);
        }
    expect(0, "which?");
}
