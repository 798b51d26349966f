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

#define TURN_NS 250000         /* a busy userfaultfd lets the others, and the loop, have a look */
#define BACK_TO_BACK_NS 200000 /* faults closer than this make reading again worth while */
#define PATIENCE 3             /* windows of reading in vain before it is given up */
#define MAX_PENALTY 63         /* quick faults before reading again is tried once more */
#define CONTENDED_NS 300000    /* a yield that takes so long: somebody else wants the core */
#define SHUN_NS 4000000        /* for so long, at first, reading again is given up then */
#define MAX_SHUN_NS 1280000000
#define LOOP UINT64_MAX /* epoll data of the event loop's descriptor */

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

/* Adapts the number of reads to the load.  `gap` is the time (ns) since the last answer, `tries` how
 * many empty reads came before this one.  Only a hit shows that reading again is worth while; after
 * vain attempts more and more quick faults have to come before it is tried once more. */
static void busy(struct uffdaemon_port *port, uint64_t gap, unsigned tries)
{
    if (tries)
        port->misses = port->penalty = 0;
    if (port->rereads)
        return;
    if (gap >= BACK_TO_BACK_NS || port->last + gap < port->shunned)
        port->quick = 0;
    else if (++port->quick > port->penalty) {
        port->rereads = port->reread_limit;
        port->quick = port->misses = 0;
    }
}

static void idle(struct uffdaemon_port *port)
{
    if (!port->rereads || ++port->misses < PATIENCE)
        return;
    port->rereads = port->quick = port->misses = 0;
    if (port->penalty < MAX_PENALTY)
        port->penalty = 2 * port->penalty + 1;
}

/* Somebody else had the core for a time slice, milliseconds, when it was yielded at `now`.  A sleeper
 * gets it back at once when a fault wakes it, so reading again is given up for a while: a short one
 * if it was an accident, longer and longer if the core is wanted all the time. */
static void shun(struct uffdaemon_port *port, uint64_t now)
{
    /* Undisturbed for as long as the last time lasted: an accident again. */
    if (now - port->shunned > port->shun)
        port->shun = 0;
    port->shun = port->shun ? 2 * port->shun : SHUN_NS;
    if (port->shun > MAX_SHUN_NS)
        port->shun = MAX_SHUN_NS;
    port->shunned = now + port->shun;
    port->rereads = port->quick = port->misses = 0;
}

/* Reads and answers until nothing is pending after the re-reads, a message is for Python, there is
 * no room for another batch, or the turn is over.  Never sleeps.
 * Returns whether only its turn has ended, and more is likely to come at once. */
int uffdaemon_serve(struct uffdaemon_port *port)
{
    uint64_t now = uffdaemon_now(), begun = now, before;
    unsigned tries = 0;

    /* An event that Python has not seen yet may void the rules: nothing is answered by them now. */
    if (port->forwarded)
        return 0;
    while (port->count + UFFDAEMON_MESSAGES <= port->capacity) {
        ssize_t bytes = read(port->fd, port->messages, sizeof(port->messages));

        port->reads++;
        if (bytes <= 0) {
            if (bytes == 0 || (errno != EAGAIN && errno != EINTR)) {
                port->error = bytes ? errno : EIO;
                return 0;
            }
            port->empty_reads++;
            if (tries++ >= port->rereads) {
                idle(port);
                return 0;
            }
            before = uffdaemon_now();
            sched_yield();
            now = uffdaemon_now();
            if (now - before > CONTENDED_NS)
                shun(port, now);
            continue;
        }
        now = uffdaemon_now();
        busy(port, now - port->last, tries);
        tries = 0;
        take(port, (size_t)bytes / sizeof(struct uffd_msg), now);
        port->last = now;
        if (port->forwarded)
            return 0;
        if (now - begun > TURN_NS)
            return port->rereads > 0;
    }
    return 0;
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

/* Serves one port; it is `hot` if its turn ended while it was busy.  Returns whether Python has to
 * look at it. */
static int attend(struct uffdaemon_port *port, struct uffdaemon_port **hot)
{
    if (!port->error && uffdaemon_serve(port))
        *hot = port;
    return port->error || port->count;
}

/* Waits and serves for at most `timeout` ns.  Returns 0 when the time is over or a signal came, 1
 * when the event loop has something to do, 2 when a port has something for Python; or -errno. */
int uffdaemon_wait(int epoll, int64_t timeout)
{
    uint64_t end = uffdaemon_now() + (uint64_t)timeout;
    struct uffdaemon_port *hot = NULL; /* not to be slept over */

    for (;;) {
        struct epoll_event events[32];
        struct uffdaemon_port *again = hot;
        uint64_t now = uffdaemon_now();
        /* Rounded up, as the event loop itself does: never woken for a timer not yet due. */
        uint64_t rest = now < end && !hot ? (end - now + 999999) / 1000000 : 0;
        int count = epoll_wait(epoll, events, 32, rest > 3600000 ? 3600000 : (int)rest);
        int loop = 0, python = 0;

        if (count < 0)
            return errno == EINTR ? 0 : -errno;
        hot = NULL;
        if (again)
            python |= attend(again, &hot);
        for (int index = 0; index < count; index++) {
            struct uffdaemon_port *port = (void *)(uintptr_t)events[index].data.u64;

            if (events[index].data.u64 == LOOP)
                loop = 1;
            else if (port != again)
                python |= attend(port, &hot);
        }
        if (python)
            return 2;
        if (loop)
            return 1;
        if (uffdaemon_now() >= end)
            return 0;
    }
}
