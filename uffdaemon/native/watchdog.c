/*
 * The watchdog: a thread that says who waits when Python cannot.
 *
 * A fault that has been forwarded, or that nobody reads, and that Python does not take in for a
 * while, may be one that Python itself waits for.  This thread needs nothing of Python: it looks at
 * what the ports keep, writes who waits, where and since when, has faulthandler write that thread's
 * Python stack by a signal, and then does what was declared.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "native.h"
#include "text.h"

#define ROUND_NS 100000000 /* between two looks while something waits for Python */
#define POLL_NS 250000000  /* the same at userfaultfds that nobody may be reading */
#define STACK_NS 20000000  /* what a stack takes to be written, and its thread to wait again */
#define TOLD 32
#define HUGE_PAGE (2u << 20)

struct uffdaemon_watch {
    struct uffdaemon_watch *next;
    struct uffdaemon_port *port; /* NULL: nobody serves the userfaultfd any more */
    int fd;
    uint32_t then, told_count;
    uint64_t after;
    uint32_t quiet;               /* what nobody reads has been said */
    uint64_t reads, unread_since; /* of a port that the event loop serves */
    uint64_t told[TOLD]; /* addresses */
    char name[64];
};

static pthread_mutex_t watching = PTHREAD_MUTEX_INITIALIZER;
static struct uffdaemon_watch *watches;
static pid_t process;
static uint32_t alarmed; /* a futex: something waits for Python, or there is more to look after */
static int stacks; /* the signal by which faulthandler writes a thread's stack; 0: none */

static void say(const struct uffdaemon_watch *watch, const struct uffd_msg *message, uint64_t age)
{
    struct uffdaemon_line line = {.length = 0};

    uffdaemon_line_add(&line, "uffdaemon: thread ");
    uffdaemon_line_add_number(&line, message->arg.pagefault.feat.ptid, 10);
    uffdaemon_line_add(&line, " has waited for ");
    uffdaemon_line_add_number(&line, age / 1000000, 10);
    uffdaemon_line_add(&line, " ms for ");
    uffdaemon_line_add_number(&line, message->arg.pagefault.address, 16);
    uffdaemon_line_add(&line, message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE
                                  ? " (a write) in "
                                  : " (an access) in ");
    uffdaemon_line_add(&line, watch->name);
    uffdaemon_line_add(&line, watch->port
                                  ? ": Python does not take the fault in; whoever holds the GIL, or "
                                    "keeps trio's loop busy, may be that very thread"
                                  : ": whoever guarded this memory has ended");
    uffdaemon_line_write(&line);
}

/* Its pages are asked for at a userfaultfd of its own, which nobody serves yet. */
static void say_child(const struct uffdaemon_watch *watch, uint64_t age)
{
    struct uffdaemon_line line = {.length = 0};

    uffdaemon_line_add(&line, "uffdaemon: a forked child that shares ");
    uffdaemon_line_add(&line, watch->name);
    uffdaemon_line_add(&line, " has not been taken in for ");
    uffdaemon_line_add_number(&line, age / 1000000, 10);
    uffdaemon_line_add(&line, watch->port ? " ms: whoever waits for it may keep trio's loop from that"
                                          : " ms: whoever guarded this memory has ended");
    uffdaemon_line_write(&line);
}

/* Has the page poisoned; its thread gets SIGBUS. */
static void poison(const struct uffdaemon_watch *watch, uint64_t address)
{
    static const uint64_t sizes[] = {4096, HUGE_PAGE, 1u << 30};

    for (size_t index = 0; index < sizeof(sizes) / sizeof(sizes[0]); index++) {
        struct uffdaemon_operation operation = {
            .code = _UFFDIO_POISON,
            .dst = address & ~(sizes[index] - 1),
            .length = sizes[index],
            .page_size = sizes[index],
        };

        uffdaemon_execute(watch->fd, &operation, 1);
        if (operation.error == EINVAL)
            continue; /* made of larger pages, it may be */
        if (watch->port)
            uffdaemon_signal_release(watch->port, operation.dst, operation.length);
        return;
    }
}

static int told(struct uffdaemon_watch *watch, uint64_t address)
{
    for (size_t index = 0; index < TOLD; index++)
        if (watch->told[index] == address)
            return 1;
    watch->told[watch->told_count++ % TOLD] = address;
    return 0;
}

/* Whether a thread waits in user mode: only there a signal is handled while its page is missing.  See
 * proc_pid_syscall(5). */
static int in_user_mode(uint32_t thread)
{
    char path[64], state[16] = "";
    int fd;

    snprintf(path, sizeof(path), "/proc/self/task/%u/syscall", thread);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    if (read(fd, state, sizeof(state) - 1) <= 0)
        state[0] = 0;
    close(fd);
    return strncmp(state, "-1 ", 3) == 0;
}

/* Has faulthandler write the Python stack of a thread, by that thread: nobody else changes it. */
static void write_stack(const struct uffdaemon_watch *watch, const struct uffd_msg *message)
{
    uint32_t thread = message->arg.pagefault.feat.ptid;
    struct timespec pause = {0, STACK_NS};

    /* Who waits in its signal handler, in futex(2), has this signal unblocked. */
    int in_handler = watch->port && __atomic_load_n(&watch->port->waiters, __ATOMIC_RELAXED);

    if (stacks && thread && (in_handler || in_user_mode(thread))) {
        syscall(SYS_tgkill, getpid(), thread, stacks);
        nanosleep(&pause, NULL);
    }
}

/* Says who waits, unless that was said before, and does what was declared. */
static void bark(struct uffdaemon_watch *watch, const struct uffd_msg *messages, size_t count,
                 uint64_t age)
{
    int news = 0;

    for (size_t index = 0; index < count; index++)
        if (messages[index].event == UFFD_EVENT_PAGEFAULT &&
            !told(watch, messages[index].arg.pagefault.address)) {
            say(watch, &messages[index], age);
            write_stack(watch, &messages[index]);
            news = 1;
        } else if (messages[index].event == UFFD_EVENT_FORK &&
                   !told(watch, messages[index].arg.fork.ufd)) {
            say_child(watch, age);
            news = 1;
        }
    if (watch->then == UFFDAEMON_EXIT && news)
        _exit(UFFDAEMON_EXIT_STATUS);
    for (size_t index = 0; watch->then == UFFDAEMON_POISON && index < count; index++)
        if (messages[index].event == UFFD_EVENT_PAGEFAULT)
            poison(watch, messages[index].arg.pagefault.address);
}

/* What was forwarded and is not taken; whether there is anything. */
static int look_at_queue(struct uffdaemon_watch *watch, uint64_t now)
{
    struct uffd_msg messages[TOLD];
    struct uffdaemon_queue *queue = &watch->port->queue;
    uint64_t since = __atomic_load_n(&queue->since, __ATOMIC_RELAXED);

    if (!since) {
        memset(watch->told, 0, sizeof(watch->told));
        return 0;
    }
    if (now > since && now - since >= watch->after)
        bark(watch, messages, uffdaemon_queue_look(queue, messages, TOLD), now - since);
    return 1;
}

/* What nobody reads.  Faults that are read here are woken, so that they come again; events are the
 * port's. */
static void look_at_descriptor(struct uffdaemon_watch *watch, uint64_t now)
{
    struct pollfd ready = {.fd = watch->fd, .events = POLLIN};
    struct uffd_msg messages[TOLD];
    uint64_t reads = watch->port ? __atomic_load_n(&watch->port->reads, __ATOMIC_RELAXED) : 0;
    ssize_t bytes;

    if (poll(&ready, 1, 0) <= 0 || !(ready.revents & POLLIN) || reads != watch->reads) {
        watch->reads = reads;
        watch->unread_since = 0;
        watch->quiet = 0;
        return;
    }
    if (watch->quiet)
        return;
    if (!watch->unread_since)
        watch->unread_since = now;
    if (now - watch->unread_since < watch->after)
        return;
    bytes = read(watch->fd, messages, sizeof(messages));
    if (bytes <= 0)
        return;
    bark(watch, messages, (size_t)bytes / sizeof(messages[0]), now - watch->unread_since);
    for (size_t index = 0; index < (size_t)bytes / sizeof(messages[0]); index++) {
        struct uffdaemon_record record = {.message = messages[index], .latency = now};

        if (messages[index].event != UFFD_EVENT_PAGEFAULT && watch->port)
            uffdaemon_queue_push(&watch->port->queue, &record, now);
        else if (messages[index].event == UFFD_EVENT_PAGEFAULT && watch->port)
            uffdaemon_watch_wake(watch, messages[index].arg.pagefault.address & ~UINT64_C(4095),
                                 4096);
    }
    watch->unread_since = 0;
    watch->quiet = watch->port != NULL;
}

/* Something waits for Python.  From any thread, and from signal handlers. */
void uffdaemon_watch_alarm(void)
{
    if (!__atomic_exchange_n(&alarmed, 1, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &alarmed, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL, NULL, 0);
}

/* Looks at everything once; returns how long nothing can be missed, ns, or 0: until the alarm. */
static uint64_t look_around(void)
{
    uint64_t now = uffdaemon_now(), pause = 0;

    pthread_mutex_lock(&watching);
    __atomic_store_n(&alarmed, 0, __ATOMIC_SEQ_CST);
    for (struct uffdaemon_watch *watch = watches; watch; watch = watch->next) {
        if (!watch->port || watch->port->notify < 0) {
            look_at_descriptor(watch, now);
            if (!pause)
                pause = POLL_NS;
        }
        if (watch->port && look_at_queue(watch, now))
            pause = ROUND_NS;
    }
    pthread_mutex_unlock(&watching);
    return pause;
}

static void *run(void *argument)
{
    (void)argument;
    for (;;) {
        uint64_t pause = look_around();
        struct timespec time = {0, (long)pause};

        if (pause)
            nanosleep(&time, NULL);
        else
            syscall(SYS_futex, &alarmed, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 0, NULL, NULL, 0);
    }
    return NULL;
}

/* Starts the thread, if this process has none.  0 or -errno. */
static int start(void)
{
    sigset_t blocked, old;
    pthread_t thread;
    int error;

    if (process == getpid())
        return 0;
    sigfillset(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, &old);
    error = pthread_create(&thread, NULL, run, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (error)
        return -error;
    pthread_setname_np(thread, "uffd-watchdog");
    pthread_detach(thread);
    process = getpid();
    return 0;
}

/* Watches a userfaultfd: what `port` keeps from Python, or with NULL one that nobody serves.  `after`
 * is ns.  `signal` makes faulthandler write the stack of a thread; 0: nothing does.  NULL: *error says why. */
struct uffdaemon_watch *uffdaemon_watch_add(int fd, struct uffdaemon_port *port, uint64_t after,
                                            unsigned then, int signal, const char *name, int *error)
{
    struct uffdaemon_watch *watch = calloc(1, sizeof(*watch));

    if (!watch) {
        *error = ENOMEM;
        return NULL;
    }
    watch->fd = fd;
    watch->port = port;
    watch->after = after;
    watch->then = then;
    strncpy(watch->name, name, sizeof(watch->name) - 1);
    if (process && process != getpid()) {
        /* A forked child: its parent's watches are not its own, and the lock may be anybody's. */
        pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;

        watching = fresh;
        watches = NULL;
    }
    pthread_mutex_lock(&watching);
    stacks = signal;
    *error = -start();
    if (!*error) {
        watch->next = watches;
        watches = watch;
    }
    pthread_mutex_unlock(&watching);
    uffdaemon_watch_alarm();
    if (*error) {
        free(watch);
        return NULL;
    }
    return watch;
}

/* Has threads that wait in a range fault again, whose messages have been read before. */
void uffdaemon_watch_wake(const struct uffdaemon_watch *watch, uint64_t start, uint64_t length)
{
    struct uffdaemon_operation operation = {.code = _UFFDIO_WAKE, .dst = start, .length = length};

    uffdaemon_execute(watch->fd, &operation, 1);
}

/* Watches it no more; neither port nor descriptor is used when this returns. */
void uffdaemon_watch_remove(struct uffdaemon_watch *watch)
{
    struct uffdaemon_watch **at;

    if (process != getpid())
        return;
    pthread_mutex_lock(&watching);
    for (at = &watches; *at; at = &(*at)->next)
        if (*at == watch) {
            *at = watch->next;
            free(watch);
            break;
        }
    pthread_mutex_unlock(&watching);
}
