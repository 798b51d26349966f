/* Threads that cause events, each checked by the thread that caused it; and ports that come and go. */
#include "stress.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define GUEST_PAGES 24u

/* A child that is being made has the descriptors already: closing one does not void its event then,
 * which nobody could read any more.  And while it is being made, a guest's faults may have to wait for
 * so long that they are forwarded, to nobody. */
static pthread_rwlock_t forking = PTHREAD_RWLOCK_INITIALIZER;

/* Discards `count` pages, and looks at some of them. */
static void discard(struct region *region, uint64_t start, unsigned first, unsigned count,
                    uint64_t *seed)
{
    for (unsigned page = first; page < first + count; page++)
        if (__atomic_load_n(&region->state[page], __ATOMIC_SEQ_CST) == INTACT)
            __atomic_store_n(&region->state[page], DISCARDING, __ATOMIC_SEQ_CST);
    check(!madvise((void *)(uintptr_t)(start + first * PAGE), count * PAGE, MADV_DONTNEED),
          "MADV_DONTNEED", start, (uint64_t)errno);
    for (unsigned page = first; page < first + count; page++)
        __atomic_store_n(&region->state[page], DISCARDED, __ATOMIC_SEQ_CST);
    for (unsigned page = first; page < first + count; page += 1 + next_random(seed) % 3)
        look(region, page, start + page * PAGE, (int)(next_random(seed) & 1));
}

static void discard_some(struct region *region, uint64_t *seed)
{
    unsigned first = next_random(seed) % PAGES, count = 1 + next_random(seed) % 8;
    discard(region, region->start, first, first + count > PAGES ? PAGES - first : count, seed);
}

/* To another place, from which some pages are looked at. */
static void move(struct region *region, uint64_t *seed)
{
    uint64_t target;

    pthread_rwlock_wrlock(&region->lock);
    target = (uint64_t)(uintptr_t)mmap(NULL, LENGTH, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(!uffdaemon_remap(region->start, LENGTH, target), "mremap", region->start, target);
    region->start = target;
    for (unsigned page = next_random(seed) % 8; page < PAGES; page += 1 + next_random(seed) % 16)
        look(region, page, target + page * PAGE, (int)(next_random(seed) & 1));
    pthread_rwlock_unlock(&region->lock);
}

/* Unmaps everything, and guards memory anew. */
static void renew(struct service *service, struct region *region, uint64_t *seed)
{
    uint64_t ioctls, part = region->start + PAGE * (next_random(seed) % PAGES);

    pthread_rwlock_wrlock(&region->lock);
    check(!uffdaemon_unmap(part, PAGE), "munmap", part, 0);
    check(!uffdaemon_unmap(region->start, LENGTH), "munmap", region->start, 0);
    region->start = (uint64_t)(uintptr_t)mmap(NULL, LENGTH, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(!uffdaemon_register(service->fd, region->start, LENGTH, UFFDIO_REGISTER_MODE_MISSING,
                              &ioctls),
          "register", region->start, 0);
    pthread_mutex_lock(&service->books);
    uffdaemon_port_settle(service->port);
    catch_up(service);
    uffdaemon_pages_put(region->pages);
    region->pages = uffdaemon_pages_new(PAGES);
    for (unsigned page = 0; page < PAGES; page++) {
        region->at[page] = region->start + page * PAGE;
        region->zeros[page] = 0;
        __atomic_store_n(&region->state[page], INTACT, __ATOMIC_SEQ_CST);
    }
    publish_at_once(service);
    pthread_mutex_unlock(&service->books);
    pthread_rwlock_unlock(&region->lock);
}

/* The memory of a child that does nothing but end; the event is waited for by fork(2). */
static void fork_once(void)
{
    long child;

    pthread_rwlock_wrlock(&forking);
    child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0)
        syscall(SYS_exit_group, 0);
    check(child > 0, "fork", (uint64_t)errno, 0);
    while (waitpid((pid_t)child, NULL, 0) < 0 && errno == EINTR)
        ;
    pthread_rwlock_unlock(&forking);
}

void *churn(void *argument)
{
    struct service *service = argument;
    uint64_t seed = 3;

    for (unsigned round = 0; !stopped(); round++) {
        discard_some(&service->regions[CHURNED + next_random(&seed) % 3], &seed);
        if (round % 8 == 2)
            move(&service->regions[MOVING], &seed);
        if (round % 16 == 3)
            renew(service, &service->regions[next_random(&seed) % REGIONS], &seed);
        if (round % 64 == 5 && !service->in_thread)
            fork_once();
    }
    return NULL;
}

/* One port after another, with memory of its own, which is left alone when the port goes. */
void *come_and_go(void *argument)
{
    const struct guest *guest = argument;
    uint64_t seed = 17;

    while (!stopped()) {
        uint64_t length = GUEST_PAGES * PAGE, ioctls, word, start;
        int error = pthread_rwlock_rdlock(&forking);
        int fd = open_userfaultfd(guest->in_thread);
        int notify = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        struct uffdaemon_port *port = uffdaemon_port_new(fd, 10, notify);
        struct uffdaemon_record record;
        struct uffdaemon_watch *watch;
        struct uffdaemon_pages *pages = uffdaemon_pages_new(GUEST_PAGES);
        struct uffdaemon_rule rule = {.code = _UFFDIO_COPY,
                                      .page_size = PAGE,
                                      .window = PAGE * 2,
                                      .pages = (uint64_t)(uintptr_t)pages,
                                      .zeros = 1};
        struct region own = {.number = 9};

        own.source = aligned_alloc(PAGE, length);
        for (unsigned page = 0; page < GUEST_PAGES; page++)
            for (unsigned byte = 0; byte < PAGE; byte += 8)
                *(uint64_t *)(void *)(own.source + page * PAGE + byte) = word_of(9, page);
        start = (uint64_t)(uintptr_t)mmap(NULL, length, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(!uffdaemon_register(fd, start, length, UFFDIO_REGISTER_MODE_MISSING, &ioctls),
              "register", start, 9);
        rule.start = rule.origin = start;
        rule.end = start + length;
        rule.src = (uint64_t)(uintptr_t)own.source;
        atomic_store(&port->record_all, next_random(&seed) & 1);
        check(!uffdaemon_resolver_add(guest->resolver, port), "resolver_add", 0, 0);
        if (guest->in_thread)
            check(!uffdaemon_sigbus_add(port), "signal_add", 0, 0);
        watch = uffdaemon_watch_add(fd, port, 1000000, UFFDAEMON_REPORT, 0, "a guest", &error);
        check(watch != NULL, "watch_add", (uint64_t)error, 0);
        check(!uffdaemon_port_publish(port, &rule, 1, 0), "publish", 0, 0);
        uffdaemon_pages_put(pages); /* the rule has it */
        for (unsigned page = 0; page < GUEST_PAGES; page++)
            look(&own, page, start + page * PAGE, page & 1);
        if (next_random(&seed) & 1)
            discard(&own, start, next_random(&seed) % 16, 8, &seed);
        uffdaemon_watch_remove(watch);
        if (guest->in_thread)
            uffdaemon_sigbus_remove(port);
        uffdaemon_resolver_remove(guest->resolver, port);
        while (uffdaemon_port_dequeue(port, &record, 1))
            check(record.code || record.message.event == UFFD_EVENT_REMOVE,
                  "a guest's fault was forwarded", record.error, 0);
        uffdaemon_port_free(port);
        close(fd);
        close(notify);
        pthread_rwlock_unlock(&forking);
        check(!touch(start, 0, &word), "memory that nobody guards", start, 0);
        munmap((void *)(uintptr_t)start, length);
        free(own.source);
        pause_us(200);
    }
    return NULL;
}
