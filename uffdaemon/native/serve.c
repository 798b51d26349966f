/*
 * Serving userfaultfds while the event loop sleeps.
 *
 * `uffdaemon_wait` takes the place of the loop's own sleep: it waits for the userfaultfds and for
 * the loop's epoll descriptor together, answers by rules whatever can be answered so, and returns
 * once the loop has something to do, its timer runs out, or a message needs Python.
 */
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "native.h"

#define TURN_NS 250000        /* a busy userfaultfd lets the others, and the loop, have a look */
#define BACK_TO_BACK_NS 200000 /* faults closer than this make reading again worth while */
#define PATIENCE 3            /* windows of reading in vain before it is given up */
#define LOOP UINT64_MAX       /* epoll data of the event loop's descriptor */

uint64_t uffdaemon_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Takes what was read into records.  A batch with an event in it is Python's as a whole: a range
 * that was removed must be known before the faults in it are answered.  So is one that filled the
 * buffer, since more may be pending. */
static void take(struct uffdaemon_port *port, size_t count, uint64_t now)
{
    struct uffdaemon_record *records = (void *)(uintptr_t)port->records;
    struct uffdaemon_record *fresh = records + port->count;
    int lowered = port->rule_count && count < UFFDAEMON_MESSAGES;
    size_t kept = 0;

    for (size_t index = 0; index < count; index++) {
        memset(&fresh[index], 0, sizeof(fresh[index]));
        fresh[index].message = port->messages[index];
        if (port->messages[index].event != UFFD_EVENT_PAGEFAULT)
            lowered = 0;
    }
    if (lowered)
        uffdaemon_answer(port, fresh, count, now);
    for (size_t index = 0; index < count; index++) {
        if (fresh[index].code && !port->record_all)
            continue;
        if (!fresh[index].code)
            port->forwarded++;
        if (kept != index)
            fresh[kept] = fresh[index];
        kept++;
    }
    port->count += (uint32_t)kept;
}

/* Adapts the number of reads to the load.  `gap` is the time (ns) since the last answer. */
static void busy(struct uffdaemon_port *port, uint64_t gap)
{
    port->misses = 0;
    if (gap < BACK_TO_BACK_NS)
        port->rereads = port->reread_limit;
}

static void idle(struct uffdaemon_port *port)
{
    if (port->rereads && ++port->misses >= PATIENCE)
        port->rereads = port->misses = 0;
}

/* Reads and answers until nothing is pending after the re-reads, a message is for Python, there is
 * no room for another batch, or the turn is over.  Never sleeps. */
void uffdaemon_serve(struct uffdaemon_port *port)
{
    uint64_t now = uffdaemon_now(), begun = now;
    unsigned tries = 0;

    while (port->count + UFFDAEMON_MESSAGES <= port->capacity) {
        ssize_t bytes = read(port->fd, port->messages, sizeof(port->messages));

        port->reads++;
        if (bytes <= 0) {
            if (bytes == 0 || (errno != EAGAIN && errno != EINTR)) {
                port->error = bytes ? errno : EIO;
                return;
            }
            port->empty_reads++;
            if (tries++ >= port->rereads) {
                idle(port);
                return;
            }
            sched_yield();
            continue;
        }
        now = uffdaemon_now();
        busy(port, now - port->last);
        tries = 0;
        take(port, (size_t)bytes / sizeof(struct uffd_msg), now);
        port->last = now;
        if (port->forwarded || now - begun > TURN_NS)
            return;
    }
}

/* An epoll descriptor to wait on, which the caller closes; or -errno. */
int uffdaemon_wait_open(void)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    return epoll < 0 ? -errno : epoll;
}

/* Waits for `fd` as well: the userfaultfd of the port at address `port`, or with UINT64_MAX the
 * event loop's descriptor. */
int uffdaemon_wait_add(int epoll, int fd, uint64_t port)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = port};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

int uffdaemon_wait_remove(int epoll, int fd)
{
    return epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL) ? -errno : 0;
}

/* Waits and serves for at most `timeout` ns.  Returns 0 when the time is over or a signal came, 1
 * when the event loop has something to do, 2 when a port has something for Python; or -errno. */
int uffdaemon_wait(int epoll, int64_t timeout)
{
    uint64_t end = uffdaemon_now() + (uint64_t)timeout;

    for (;;) {
        struct epoll_event events[32];
        uint64_t now = uffdaemon_now();
        /* Rounded up, as the event loop itself does: never woken for a timer not yet due. */
        uint64_t rest = now < end ? (end - now + 999999) / 1000000 : 0;
        int count = epoll_wait(epoll, events, 32, rest > 3600000 ? 3600000 : (int)rest);
        int loop = 0, python = 0;

        if (count < 0)
            return errno == EINTR ? 0 : -errno;
        for (int index = 0; index < count; index++) {
            struct uffdaemon_port *port = (void *)(uintptr_t)events[index].data.u64;

            if (events[index].data.u64 == LOOP) {
                loop = 1;
                continue;
            }
            if (!port->error)
                uffdaemon_serve(port);
            if (port->error || port->count)
                python = 1;
        }
        if (python)
            return 2;
        if (loop)
            return 1;
        if (uffdaemon_now() >= end)
            return 0;
    }
}
