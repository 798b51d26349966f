/*
 * Everything that uses a port at once, for sanitizers to look at, and with every page's content
 * checked: `stress thread|in-thread SECONDS`.
 */
#include "stress.h"

#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define WATCH_AFTER_NS 50000000

static uint32_t ended;
static uint64_t touched;
static __thread sigjmp_buf *volatile escape;

void fail(const char *what, uint64_t first, uint64_t second)
{
    fprintf(stderr, "stress: %s (%#llx, %#llx)\n", what, (unsigned long long)first,
            (unsigned long long)second);
    _exit(1);
}

void check(int holds, const char *what, uint64_t first, uint64_t second)
{
    if (!holds)
        fail(what, first, second);
}

int stopped(void)
{
    return __atomic_load_n(&ended, __ATOMIC_ACQUIRE) != 0;
}

uint64_t next_random(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005ULL + 1442695040888963407ULL;
    return *seed >> 33;
}

void pause_us(unsigned microseconds)
{
    const struct timespec pause = {0, (long)microseconds * 1000};
    nanosleep(&pause, NULL);
}

uint64_t word_of(unsigned region, unsigned page)
{
    return 0x6b6d656d00000000ULL | region << 16 | page;
}

int open_userfaultfd(int in_thread)
{
    uint64_t ioctls, features = UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |
                                UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_THREAD_ID |
                                UFFD_FEATURE_EXACT_ADDRESS | UFFD_FEATURE_POISON;
    int fd = uffdaemon_open_syscall(0);

    features |= in_thread ? UFFD_FEATURE_SIGBUS : UFFD_FEATURE_EVENT_FORK;
    check(fd >= 0, "userfaultfd", (uint64_t)-fd, 0);
    check(!uffdaemon_handshake(fd, &features, &ioctls), "UFFDIO_API", 0, 0);
    return fd;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    (void)context;
    check(escape != NULL, "a signal out of place", (uint64_t)number,
          (uint64_t)(uintptr_t)info->si_addr);
    siglongjmp(*escape, 1);
}

/* Touches one word.  Returns 0, or 1 if SIGBUS came of it. */
int touch(uint64_t address, int write, uint64_t *word)
{
    sigjmp_buf here;
    uint64_t *at = (uint64_t *)(uintptr_t)address;

    if (sigsetjmp(here, 1)) {
        escape = NULL;
        return 1;
    }
    escape = &here;
    *word = write ? __atomic_fetch_add(at, 0, __ATOMIC_RELAXED)
                  : __atomic_load_n(at, __ATOMIC_RELAXED);
    escape = NULL;
    return 0;
}

/* Touches a page, and checks that it holds what it is to hold by now. */
int look(const struct region *region, unsigned page, uint64_t address, int write)
{
    int refused = region->number == REFUSED && page & 8;
    uint32_t before = __atomic_load_n(&region->state[page], __ATOMIC_SEQ_CST), after;
    uint64_t word = 0;
    int bus = touch(address + (page * 8) % PAGE, write, &word);

    after = __atomic_load_n(&region->state[page], __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&touched, 1, __ATOMIC_RELAXED);
    if (before == DISCARDED)
        check(!bus && word == 0, "a page that was discarded is not zeros",
              (uint64_t)region->number << 32 | page, bus ? 1 : word);
    else if (bus)
        check(refused, "SIGBUS", (uint64_t)region->number << 32 | page, address);
    else if (after == INTACT || word)
        check(!refused && word == word_of(region->number, page), "a page holds something else",
              (uint64_t)region->number << 32 | page, word);
    return bus;
}

static void *keep_touching(void *argument)
{
    struct service *service = argument;
    uint64_t seed = (uint64_t)(uintptr_t)&seed;

    while (!stopped()) {
        struct region *region = &service->regions[next_random(&seed) % REGIONS];
        unsigned page = next_random(&seed) % PAGES;

        pthread_rwlock_rdlock(&region->lock);
        look(region, page, region->start + page * PAGE, (int)(next_random(&seed) & 1));
        pthread_rwlock_unlock(&region->lock);
    }
    return NULL;
}

static void *keep_taking(void *argument)
{
    struct service *service = argument;
    struct pollfd told = {.fd = service->notify, .events = POLLIN};

    for (unsigned round = 0; __atomic_load_n(&ended, __ATOMIC_ACQUIRE) < 2; round++) {
        poll(&told, 1, 5);
        if (round % 1000 == 999)
            pause_us(200000); /* the watchdog's turn */
        pthread_mutex_lock(&service->books);
        catch_up(service);
        pthread_mutex_unlock(&service->books);
        answer_pending(service);
        atomic_store(&service->port->record_all, round >> 4 & 1);
    }
    return NULL;
}

static void *keep_publishing(void *argument)
{
    struct service *service = argument;
    uint64_t seed = 5;

    while (!stopped()) {
        pthread_mutex_lock(&service->books);
        publish(service);
        pthread_mutex_unlock(&service->books);
        pause_us(next_random(&seed) % 1000);
    }
    return NULL;
}

static void *keep_withdrawing(void *argument)
{
    struct service *service = argument;
    uint64_t seed = 7;

    while (!stopped()) {
        uffdaemon_port_withdraw(service->port);
        pause_us(next_random(&seed) % 300);
        pthread_mutex_lock(&service->books);
        publish_at_once(service);
        pthread_mutex_unlock(&service->books);
        pause_us(2000);
    }
    return NULL;
}

static void *keep_executing(void *argument)
{
    uint64_t seed = 11;

    while (!stopped()) {
        execute_one(argument, &seed);
        pause_us(50);
    }
    return NULL;
}

int main(int count, char **arguments)
{
    static struct service service;
    static void *(*const works[])(void *) = {churn,          keep_publishing, keep_withdrawing,
                                             keep_executing, keep_touching,   keep_touching,
                                             keep_touching};
    enum { WORKS = sizeof(works) / sizeof(works[0]), GUESTS = 2 };
    pthread_t threads[WORKS + GUESTS], taker;
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER};
    struct guest guest;
    struct uffdaemon_watch *watch;
    struct uffdaemon_record record;
    int error = 0, in_thread;

    check(count == 3, "thread|in-thread SECONDS", 0, 0);
    in_thread = strcmp(arguments[1], "in-thread") == 0;
    sigaction(SIGBUS, &action, NULL);
    forbidden = mmap(NULL, LENGTH, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    service_open(&service, in_thread);
    guest.in_thread = in_thread;
    guest.resolver = uffdaemon_resolver_start(&error);
    check(guest.resolver != NULL, "resolver_start", (uint64_t)error, 0);
    publish_at_once(&service);
    check(!uffdaemon_resolver_add(guest.resolver, service.port), "resolver_add", 0, 0);
    if (in_thread)
        check(!uffdaemon_sigbus_add(service.port), "signal_add", 0, 0);
    watch = uffdaemon_watch_add(service.fd, service.port, WATCH_AFTER_NS, UFFDAEMON_REPORT, 0,
                                "the stress test", &error);
    check(watch != NULL, "watch_add", (uint64_t)error, 0);

    pthread_create(&taker, NULL, keep_taking, &service);
    for (unsigned index = 0; index < WORKS + GUESTS; index++)
        pthread_create(&threads[index], NULL, index < WORKS ? works[index] : come_and_go,
                       index < WORKS ? (void *)&service : &guest);
    sleep((unsigned)atoi(arguments[2]));
    __atomic_store_n(&ended, 1, __ATOMIC_RELEASE);
    for (unsigned index = 0; index < WORKS + GUESTS; index++)
        pthread_join(threads[index], NULL);
    /* The last to end: the others may wait for it. */
    __atomic_store_n(&ended, 2, __ATOMIC_RELEASE);
    pthread_join(taker, NULL);

    uffdaemon_watch_remove(watch);
    if (in_thread)
        uffdaemon_sigbus_remove(service.port);
    uffdaemon_resolver_remove(guest.resolver, service.port);
    while (uffdaemon_port_dequeue(service.port, &record, 1))
        ;
    printf("%llu touches, %llu events, %llu tables, %llu pages copied by rules\n",
           (unsigned long long)touched, (unsigned long long)service.port->events,
           (unsigned long long)service.variant,
           (unsigned long long)service.port->bytes[_UFFDIO_COPY] / PAGE);
    service_close(&service);
    uffdaemon_resolver_stop(guest.resolver);
    return 0;
}
