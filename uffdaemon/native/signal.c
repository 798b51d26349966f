/*
 * Faults that the faulting thread answers itself, in its signal handler (UFFD_FEATURE_SIGBUS).
 *
 * No other thread is woken, and none has to run.  What no rule answers is handed to Python, and the
 * thread waits in the handler until its page is there.  Everything here is async-signal-safe: no
 * allocation but by mmap(2), no lock but spin locks, which are held with all signals blocked.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "native.h"
#include "text.h"

#define LOOK_NS 100000000 /* how often a waiting thread looks whether its page is there after all */
#define ENDED 64
#define MADV_POPULATE_READ_ 22 /* MADV_POPULATE_READ, Linux 5.14: before POISON */

/* What a signal handler can find without being told. */
static struct uffdaemon_port *ports;
static struct uffdaemon_readers everybody; /* of `ports` */
static uint32_t adding;
static struct sigaction previous;
static uint32_t forked; /* set in children, whose memory is not the one that `ports` fill */
static uint64_t ended[ENDED][2];
static unsigned ended_count;

/* Lets the thread run into what it would have run into without us. */
static void chain(int number, siginfo_t *info, void *context)
{
    if (previous.sa_flags & SA_SIGINFO)
        previous.sa_sigaction(number, info, context);
    else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
        previous.sa_handler(number);
    else
        signal(number, SIG_DFL); /* the access is repeated, and ends the process */
}

static void say(uint64_t address, const char *why)
{
    struct uffdaemon_line line = {.length = 0};

    uffdaemon_line_add(&line, "uffdaemon: thread ");
    uffdaemon_line_add_number(&line, (uint64_t)syscall(SYS_gettid), 10);
    uffdaemon_line_add(&line, " gets SIGBUS at ");
    uffdaemon_line_add_number(&line, address, 16);
    uffdaemon_line_add(&line, ": ");
    uffdaemon_line_add(&line, why);
    uffdaemon_line_write(&line);
}

static int write_access(const void *context)
{
#ifdef __x86_64__
    return (((const ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2) != 0;
#else
    (void)context;
    return 0;
#endif
}

static long futex(uint32_t *word, int operation, uint32_t value, const struct timespec *timeout)
{
    return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, timeout, NULL, 0);
}

static int in_memory(uint64_t page)
{
    unsigned char there = 0;
    return mincore((void *)(uintptr_t)page, 4096, &there) == 0 && (there & 1);
}

/* Whether the page is poisoned.  Kernels without CONFIG_MEMORY_FAILURE say the same of it as of one
 * that is missing, and it would be answered for ever. */
static int poisoned(uint64_t page)
{
    return madvise((void *)(uintptr_t)page, 4096, MADV_POPULATE_READ_) && errno == EHWPOISON;
}

/* Waits until Python has seen to the page, or it is there by other ways. */
static void wait_for_python(struct uffdaemon_port *port, struct uffdaemon_waiter *waiter)
{
    struct timespec look = {0, LOOK_NS};
    struct uffdaemon_waiter **at;

    while (!__atomic_load_n(&waiter->woken, __ATOMIC_ACQUIRE) &&
           !__atomic_load_n(&port->closing, __ATOMIC_ACQUIRE)) {
        futex(&waiter->woken, FUTEX_WAIT, 0, &look);
        if (in_memory(waiter->page))
            break;
    }
    uffdaemon_lock(&port->waiting);
    for (at = &port->waiters; *at; at = &(*at)->next)
        if (*at == waiter) {
            __atomic_store_n(at, waiter->next, __ATOMIC_RELAXED);
            break;
        }
    uffdaemon_unlock(&port->waiting);
}

/* What this thread has just discarded or moved is an event that may have been read only. */
static void let_events_be_applied(const struct uffdaemon_port *port)
{
    uint64_t reading = __atomic_load_n(&port->reading, __ATOMIC_SEQ_CST);

    if (reading & 1)
        while (__atomic_load_n(&port->reading, __ATOMIC_SEQ_CST) == reading)
            sched_yield();
}

/* As `uffdaemon_enter`, and no event is read before this thread has left. */
static unsigned enter(struct uffdaemon_port *port)
{
    for (;;) {
        unsigned ticket = uffdaemon_enter(&port->readers);

        if (!(__atomic_load_n(&port->reading, __ATOMIC_SEQ_CST) & 1))
            return ticket;
        uffdaemon_leave(&port->readers, ticket);
        let_events_be_applied(port);
    }
}

/* Has the rules of `port` answer.  0: done, 1: it is Python's, 2: nobody watches the page any more,
 * -1: these addresses are not ours. */
static int answer(struct uffdaemon_port *port, struct uffdaemon_record *record)
{
    uint64_t address = record->message.arg.pagefault.address;
    unsigned ticket = enter(port);
    const struct uffdaemon_table *table = uffdaemon_table_of(port);
    const struct uffdaemon_rule *rule = NULL, *minor;
    uint32_t code = 0;

    if (table) {
        rule = uffdaemon_find(table, 0, address);
        minor = uffdaemon_find(table, UFFD_PAGEFAULT_FLAG_MINOR, address);
        if (minor && !(rule && rule->code)) {
            /* The kernel does not say which of the two it is; memory is watched for one only. */
            rule = minor;
            record->message.arg.pagefault.flags |= UFFD_PAGEFAULT_FLAG_MINOR;
        }
    }
    if (rule)
        code = (uint32_t)rule->code;
    if (code)
        uffdaemon_answer(port, table, record, 1);
    uffdaemon_leave(&port->readers, ticket);
    if (!rule)
        return -1;
    /* A move says the same where its source has no page. */
    if (!record->code && record->error == ENOENT && code != _UFFDIO_MOVE)
        return 2;
    return record->code == 0;
}

/* 0: the address is none of this port's; 1: the access may be repeated; 2: the same, and `ticket` of
 * `everybody` has been given back. */
static int answer_or_wait(struct uffdaemon_port *port, uint64_t address, const void *context,
                          const unsigned *ticket)
{
    struct uffdaemon_record record = {.latency = uffdaemon_now()};
    struct uffdaemon_waiter waiter = {.page = address & ~UINT64_C(4095)};
    int python;

    record.message.event = UFFD_EVENT_PAGEFAULT;
    record.message.arg.pagefault.address = address;
    if (write_access(context))
        record.message.arg.pagefault.flags = UFFD_PAGEFAULT_FLAG_WRITE;
    python = answer(port, &record);
    if (python == 2)
        return 1;
    if (python < 0 || ((python || record.present) && poisoned(waiter.page)))
        return 0;
    if (!python && !__atomic_load_n(&port->record_all, __ATOMIC_RELAXED) && !record.error)
        return 1;
    waiter.thread = (int32_t)syscall(SYS_gettid);
    record.message.arg.pagefault.feat.ptid = (uint32_t)waiter.thread;
    if (!python) {
        uffdaemon_queue_push(&port->queue, &record, uffdaemon_now());
        uffdaemon_notify(port);
        return 1;
    }
    if (record.error == EAGAIN) {
        /* An event is in flight: its thread has to run. */
        sched_yield();
        return 1;
    }
    /* Listed before Python can know of it, so that no answer is missed. */
    waiter.since = record.latency;
    uffdaemon_lock(&port->waiting);
    waiter.next = port->waiters;
    __atomic_store_n(&port->waiters, &waiter, __ATOMIC_RELEASE);
    uffdaemon_unlock(&port->waiting);
    uffdaemon_queue_push(&port->queue, &record, record.latency);
    uffdaemon_notify(port);
    /* Who waits counts as inside of this port only: others may come and go meanwhile. */
    __atomic_fetch_add(&port->inside, 1, __ATOMIC_SEQ_CST);
    uffdaemon_leave(&everybody, *ticket);
    wait_for_python(port, &waiter);
    __atomic_fetch_sub(&port->inside, 1, __ATOMIC_SEQ_CST);
    return 2;
}

/* Whether the access is to be repeated, since its address may have ceased to be ours between the fault
 * and this: then nobody watches it any more.  If it faults once more, and nothing has changed
 * meanwhile, it was never ours. */
static int may_have_been_ours(uint64_t address)
{
    /* Initial-exec: the first use of any other may allocate. */
    static _Thread_local struct {
        uint64_t address, replaced;
    } repeated __attribute__((tls_model("initial-exec")));
    uint64_t replaced = __atomic_load_n(&uffdaemon_replaced, __ATOMIC_SEQ_CST);

    if (repeated.address == address && repeated.replaced == replaced) {
        repeated.address = 0;
        return 0;
    }
    repeated.address = address;
    repeated.replaced = replaced;
    return 1;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    int error = errno, ours = 0;
    uint64_t address = (uint64_t)(uintptr_t)info->si_addr;

    if (info->si_code == BUS_ADRERR && !forked) {
        unsigned ticket = uffdaemon_enter(&everybody);
        struct uffdaemon_port *port = __atomic_load_n(&ports, __ATOMIC_SEQ_CST);

        for (struct uffdaemon_port *each = port; each;
             each = __atomic_load_n(&each->next, __ATOMIC_SEQ_CST))
            let_events_be_applied(each);
        for (; port && !ours; port = ours ? NULL : __atomic_load_n(&port->next, __ATOMIC_SEQ_CST))
            if (address >= __atomic_load_n(&port->low, __ATOMIC_RELAXED) &&
                address < __atomic_load_n(&port->high, __ATOMIC_RELAXED))
                ours = answer_or_wait(port, address, context, &ticket);
        if (ours != 2)
            uffdaemon_leave(&everybody, ticket);
    }
    if (!ours && info->si_code == BUS_ADRERR && !forked && may_have_been_ours(address))
        ours = 1;
    if (!ours) {
        for (unsigned index = 0; index < ENDED; index++)
            if (info->si_code == BUS_ADRERR &&
                address >= __atomic_load_n(&ended[index][0], __ATOMIC_RELAXED) &&
                address < __atomic_load_n(&ended[index][1], __ATOMIC_RELAXED)) {
                say(address, forked ? "in a forked child, nobody guards this memory"
                                    : "whoever guarded this memory has ended");
                break;
            }
        chain(number, info, context);
    }
    errno = error;
}

static void in_child(void)
{
    forked = 1;
}

static int install(void)
{
    static int before;
    struct sigaction ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    struct sigaction now;

    if (sigaction(SIGBUS, NULL, &now))
        return -errno;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_bus_error)
        return 0;
    if (!before) {
        int error = pthread_atfork(NULL, NULL, in_child);
        if (error)
            return -error;
        /* Whoever has put a handler over ours since chains to ours: that would go round and round. */
        previous = now;
        before = 1;
    }
    /* All signals but the one by which the watchdog has Python stacks written. */
    sigfillset(&ours.sa_mask);
    sigdelset(&ours.sa_mask, SIGRTMAX - 1);
    return sigaction(SIGBUS, &ours, NULL) ? -errno : 0;
}

/* Has faulting threads answer by the rules of `port`.  0 or -errno. */
int uffdaemon_signal_add(struct uffdaemon_port *port)
{
    int error;

    uffdaemon_lock(&adding);
    error = install();
    if (!error) {
        __atomic_store_n(&port->in_thread, 1, __ATOMIC_SEQ_CST);
        port->next = ports;
        __atomic_store_n(&ports, port, __ATOMIC_SEQ_CST);
    }
    uffdaemon_unlock(&adding);
    return error;
}

/* Wakes those who wait for a page in the range. */
void uffdaemon_signal_release(struct uffdaemon_port *port, uint64_t start, uint64_t length)
{
    uffdaemon_lock(&port->waiting);
    for (struct uffdaemon_waiter *waiter = port->waiters; waiter; waiter = waiter->next)
        if (waiter->page >= (start & ~UINT64_C(4095)) && waiter->page - start < length) {
            __atomic_store_n(&waiter->woken, 1, __ATOMIC_RELEASE);
            futex(&waiter->woken, FUTEX_WAKE, 1, NULL);
        }
    uffdaemon_unlock(&port->waiting);
}

/* Has nobody answer by them any more; threads that wait go on, into SIGBUS. */
void uffdaemon_signal_remove(struct uffdaemon_port *port)
{
    struct timespec pause = {0, 100000};
    struct uffdaemon_port **at;

    uffdaemon_lock(&adding);
    for (at = &ports; *at; at = &(*at)->next)
        if (*at == port) {
            __atomic_store_n(at, port->next, __ATOMIC_SEQ_CST);
            break;
        }
    __atomic_store_n(&ended[ended_count % ENDED][0],
                     __atomic_load_n(&port->low, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    __atomic_store_n(&ended[ended_count % ENDED][1],
                     __atomic_load_n(&port->high, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    ended_count++;
    uffdaemon_unlock(&adding);
    __atomic_store_n(&port->closing, 1, __ATOMIC_SEQ_CST);
    uffdaemon_wait_for_readers(&everybody);
    uffdaemon_signal_release(port, 0, UINT64_MAX);
    while (__atomic_load_n(&port->inside, __ATOMIC_SEQ_CST))
        nanosleep(&pause, NULL);
}
