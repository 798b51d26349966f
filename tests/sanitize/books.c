/* What Python does with a port: it keeps books of events, publishes rules, answers what is left. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "stress.h"

#define RULES (REGIONS * PAGES)
#define PENDING 65536
#define RECORDS 512

unsigned char nothing[PAGE] __attribute__((aligned(PAGE)));
unsigned char *forbidden;

static int refused(const struct region *region, unsigned page)
{
    return region->number == REFUSED && page & 8;
}

void service_open(struct service *service, int in_thread)
{
    memset(service, 0, sizeof(*service));
    service->in_thread = in_thread;
    service->fd = open_userfaultfd(in_thread);
    service->notify = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    service->port = uffdaemon_port_new(service->fd, 20, service->notify);
    service->pending = calloc(PENDING, sizeof(uint64_t));
    pthread_mutex_init(&service->books, NULL);
    for (unsigned number = 0; number < REGIONS; number++) {
        struct region *region = &service->regions[number];
        uint64_t ioctls, start;

        region->number = number;
        region->pages = uffdaemon_pages_new(PAGES);
        pthread_rwlock_init(&region->lock, NULL);
        region->source = aligned_alloc(PAGE, LENGTH);
        start = (uint64_t)(uintptr_t)mmap(NULL, LENGTH, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        for (unsigned page = 0; page < PAGES; page++) {
            for (unsigned byte = 0; byte < PAGE; byte += 8)
                *(uint64_t *)(void *)(region->source + page * PAGE + byte) = word_of(number, page);
            region->at[page] = start + page * PAGE;
        }
        region->start = start;
        check(
            !uffdaemon_register(service->fd, start, LENGTH, UFFDIO_REGISTER_MODE_MISSING, &ioctls),
            "register", number, start);
    }
}

void service_close(struct service *service)
{
    uffdaemon_port_free(service->port);
    close(service->notify);
    close(service->fd);
    for (unsigned number = 0; number < REGIONS; number++) {
        free(service->regions[number].source);
        uffdaemon_pages_put(service->regions[number].pages);
        pthread_rwlock_destroy(&service->regions[number].lock);
    }
    free(service->pending);
    pthread_mutex_destroy(&service->books);
}

/* Enters one event into the books. */
static void enter(struct service *service, const struct uffd_msg *message)
{
    uint64_t start = message->arg.remove.start, end = message->arg.remove.end, shift = 0;

    if (message->event == UFFD_EVENT_FORK) {
        close((int)message->arg.fork.ufd);
        return;
    }
    if (message->event == UFFD_EVENT_REMAP) {
        end = start + message->arg.remap.len;
        shift = message->arg.remap.to - start;
    }
    for (struct region *region = service->regions; region < service->regions + REGIONS; region++)
        for (unsigned page = 0; page < PAGES; page++) {
            if (region->at[page] < start || region->at[page] >= end)
                continue;
            if (message->event == UFFD_EVENT_REMOVE) {
                region->zeros[page] = 1;
                uffdaemon_pages_void(region->pages, page, page + 1);
            } else {
                region->at[page] = shift ? region->at[page] + shift : 0;
            }
        }
}

/* A child is born with the states of its parent's pages; what is discarded later is not its own. */
static void check_snapshot(struct service *service, const struct uffdaemon_record *record)
{
    struct uffdaemon_snapshot *snapshot = uffdaemon_record_snapshot(record);

    for (unsigned number = 0; snapshot && number < REGIONS; number++) {
        const struct region *region = &service->regions[number];
        struct uffdaemon_pages *copy = uffdaemon_snapshot_take(snapshot, region->pages);

        for (unsigned page = 0; copy && page < PAGES; page++)
            check(!region->zeros[page] ==
                      !(uffdaemon_pages_state(copy, page) & UFFDAEMON_PAGE_DISCARDED),
                  "a child's page is not as its parent's was", number, page);
        uffdaemon_pages_put(copy);
    }
    uffdaemon_snapshot_free(snapshot);
}

/* Takes in everything that was read by now; returns how much that was.  Under `books`. */
int catch_up(struct service *service)
{
    static struct uffdaemon_record records[RECORDS];
    uint64_t told;
    long count = RECORDS;
    int taken = 0;

    while (read(service->notify, &told, sizeof(told)) < 0 && errno == EINTR)
        ;
    while (count == RECORDS) {
        count = uffdaemon_port_dequeue(service->port, records, RECORDS);
        taken += count;
        for (long index = 0; index < count; index++) {
            const struct uffdaemon_record *record = &records[index];

            if (record->message.event != UFFD_EVENT_PAGEFAULT) {
                enter(service, &record->message);
                service->events += record->present != 0;
                check_snapshot(service, record);
            } else if (!record->code) {
                check(service->pending_count < PENDING, "too much is pending", 0, 0);
                service->pending[service->pending_count++] = record->message.arg.pagefault.address &
                                                             ~(uint64_t)(PAGE - 1);
            }
        }
    }
    return taken;
}

/* The page that lies there, or NULL.  Under `books`. */
static struct region *find(struct service *service, uint64_t address, unsigned *page)
{
    for (struct region *region = service->regions; region < service->regions + REGIONS; region++)
        for (*page = 0; *page < PAGES; ++*page)
            if (region->at[*page] == address)
                return region;
    return NULL;
}

/* What brings one page, as the books have it. */
static struct uffdaemon_operation decide(const struct region *region, unsigned page)
{
    struct uffdaemon_operation operation = {
        .code = _UFFDIO_COPY, .dst = region->at[page], .length = PAGE, .page_size = PAGE};

    operation.src = (uint64_t)(uintptr_t)(region->source + page * PAGE);
    if (region->zeros[page]) {
        operation.code = _UFFDIO_ZEROPAGE;
        operation.src = 0;
    } else if (refused(region, page)) {
        operation.code = _UFFDIO_POISON;
        operation.src = 0;
    }
    return operation;
}

/* Answers what C has left.  By one thread. */
void answer_pending(struct service *service)
{
    size_t count, left = 0;

    pthread_mutex_lock(&service->books);
    count = service->pending_count;
    for (size_t index = 0; index < count; index++) {
        struct uffdaemon_operation operation = {
            .code = _UFFDIO_WAKE, .dst = service->pending[index], .length = PAGE};
        unsigned page;
        const struct region *region = find(service, service->pending[index], &page);

        if (region)
            operation = decide(region, page);
        uffdaemon_port_execute(service->port, &operation, 1, service->events);
        if (operation.error == EAGAIN) {
            service->pending[left++] = service->pending[index];
        } else if (operation.error) {
            operation.code = _UFFDIO_WAKE;
            uffdaemon_port_execute(service->port, &operation, 1, service->events);
        }
    }
    service->pending_count = left;
    pthread_mutex_unlock(&service->books);
}

/* An operation that nobody waits for, decided on before it is carried out. */
void execute_one(struct service *service, uint64_t *seed)
{
    struct region *region = &service->regions[next_random(seed) % REGIONS];
    unsigned page = next_random(seed) % PAGES;
    struct uffdaemon_operation operation;
    uint64_t events;

    pthread_mutex_lock(&service->books);
    events = service->events;
    operation = decide(region, page);
    pthread_mutex_unlock(&service->books);
    if (operation.dst)
        uffdaemon_port_execute(service->port, &operation, 1, events);
}

/* Rules for one region, cut differently each time.  Returns how many. */
static size_t write_rules(const struct service *service, const struct region *region,
                          struct uffdaemon_rule *rules)
{
    uint64_t variant = service->variant;
    unsigned longest = 3 + (unsigned)(variant * 7 % 61), first = 0;
    size_t count = 0;

    while (first < PAGES) {
        unsigned end = first + 1;

        while (end < PAGES && end - first < longest &&
               refused(region, end) == refused(region, first) &&
               region->at[end] == region->at[end - 1] + PAGE)
            end++;
        if (region->at[first] && (service->in_thread || region->number != FIXED || variant % 5)) {
            struct uffdaemon_rule rule = {
                .start = region->at[first],
                .end = region->at[end - 1] + PAGE,
                /* Now and then, a part of it is Python's. */
                .code = variant % 3 == 1 && first % 5 == 2 ? 0 : _UFFDIO_COPY,
                .src = (uint64_t)(uintptr_t)(region->source + first * PAGE),
                .origin = region->at[first] - first * PAGE,
                .page_size = PAGE,
                .window = (uint64_t)PAGE << variant % 6,
                .pages = (uint64_t)(uintptr_t)region->pages,
                .zeros = variant & 1 ? 1 : (uint64_t)(uintptr_t)nothing,
                .refusal = _UFFDIO_POISON,
            };
            if (refused(region, first))
                rule.src = (uint64_t)(uintptr_t)forbidden;
            rules[count++] = rule;
        }
        first = end;
    }
    return count;
}

static int by_start(const void *left, const void *right)
{
    const struct uffdaemon_rule *a = left, *b = right;
    return a->start < b->start ? -1 : a->start > b->start;
}

/* Publishes the rules of all regions, as the books have them.  Under `books`.  0 or -EAGAIN. */
int publish(struct service *service)
{
    static struct uffdaemon_rule rules[RULES];
    size_t count = 0;

    service->variant++;
    for (unsigned number = 0; number < REGIONS; number++)
        count += write_rules(service, &service->regions[number], rules + count);
    qsort(rules, count, sizeof(rules[0]), by_start);
    return uffdaemon_port_publish(service->port, rules, count, service->events);
}

/* The same, whatever comes in between.  Under `books`. */
void publish_at_once(struct service *service)
{
    do {
        uffdaemon_port_settle(service->port);
        catch_up(service);
    } while (publish(service));
}
