/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Faults that the faulting thread resolves itself, in its signal handler (UFFD_FEATURE_SIGBUS).
 *
 * No other thread is woken, and none has to run.  A fault without a rule is forwarded to Python,
 * and the thread waits in the handler until its page is present.  Everything here is
 * async-signal-safe: memory comes only from mmap(2), and the only locks are spin locks, held with
 * all signals blocked.
 */
#define _GNU_SOURCE
#include "sigbus.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "base.h"
#include "grace.h"
#include "postponed.h"
#include "queue.h"
#include "reading.h"
#include "rules.h"
#include "sigaction.h"
#include "table.h"
#include "text.h"
#include "waitqueue.h"

#define ENDED 64
#define TRIES 100              /* while an event is pending, before the access is retried, */
#define NO_MEMORY_NS 1000000   /* before the access is retried, without memory for its record */
#define PAUSE_NS 100000        /* and the time between them */
#define MADV_POPULATE_READ_ 22 /* MADV_POPULATE_READ, Linux 5.14: before POISON */

/* Global, since a signal handler has no argument for them. */
static struct uffdaemon_port *_Atomic ports;
static struct uffdaemon_readers readers; /* of `ports` */
static _Atomic uint32_t adding;          /* a spin lock, for `ports` and `ended` */
static struct {
    _Atomic uint64_t low, high;
    _Atomic uint32_t of_parent; /* its process is the parent of this one */
} ended[ENDED];
static unsigned ended_count;

static void report(uint64_t address, const char *why)
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

/* Whether the page is poisoned.  Without CONFIG_MEMORY_FAILURE its signal looks like that of a
 * missing page, and the handler would resolve it for ever. */
static UFFDAEMON_COLD int poisoned(uint64_t address)
{
    uint64_t page = uffdaemon_page_of(address);

    return madvise((void *)(uintptr_t)page, uffdaemon_page_size(), MADV_POPULATE_READ_) &&
           errno == EHWPOISON;
}

/* Resolves a fault by the rules of `port`.  0: done; 1: Python has to; 2: the page is no longer
 * registered; -1: not an address of this port. */
static UFFDAEMON_HOT int resolve(struct uffdaemon_port *port, struct uffdaemon_record *record)
{
    uint64_t address = record->message.arg.pagefault.address;
    unsigned ticket = uffdaemon_enter(port);
    const struct uffdaemon_table *table = uffdaemon_table_load(&port->rules);
    const struct uffdaemon_rule *rule = NULL, *minor;
    uint32_t code = 0;

    if (table) {
        rule = uffdaemon_table_find(table, 0, address);
        minor = rule && rule->code
                    ? NULL
                    : uffdaemon_table_find(table, UFFD_PAGEFAULT_FLAG_MINOR, address);
        if (minor) {
            /* The signal does not tell which of the two it is; a range is registered for one
             * only. */
            rule = minor;
            record->message.arg.pagefault.flags |= UFFD_PAGEFAULT_FLAG_MINOR;
        }
    }
    if (rule)
        code = (uint32_t)rule->code;
    if (code)
        uffdaemon_resolve(port, table, record, 1);
    uffdaemon_read_unlock(&port->rules.readers, ticket);
    if (!rule)
        return -1;
    /* A move fails with ENOENT, too, if its source has no page. */
    if (!record->code && record->error == ENOENT && code != _UFFDIO_MOVE)
        return 2;
    return record->code == 0;
}

/* Retries for a while: an event is pending, whose thread has to run.  Returns what `resolve`
 * does. */
static UFFDAEMON_COLD int resolve_between(struct uffdaemon_port *port,
                                          struct uffdaemon_record *record)
{
    struct timespec pause = {0, PAUSE_NS};
    int python = 1;

    uffdaemon_want(port, record);
    for (unsigned tries = 0; record->error == EAGAIN && tries < TRIES; tries++) {
        nanosleep(&pause, NULL);
        record->error = 0;
        python = resolve(port, record);
    }
    return python;
}

/* 0: not an address of this port; 1: retry the access; 2: the same, and `ticket` of `readers` has
 * been unlocked. */
static int resolve_or_wait(struct uffdaemon_port *port, uint64_t address, const void *context,
                           const unsigned *ticket)
{
    struct uffdaemon_record record = {.latency = uffdaemon_now()};
    struct uffdaemon_waiter waiter = {.page = 0};
    int python;

    record.message.event = UFFD_EVENT_PAGEFAULT;
    record.message.arg.pagefault.address = address;
    if (write_access(context))
        record.message.arg.pagefault.flags = UFFD_PAGEFAULT_FLAG_WRITE;
    python = resolve(port, &record);
    if (record.error == EAGAIN)
        python = resolve_between(port, &record);
    if (python == 2)
        return 1;
    if (python < 0 || ((python || record.present) && poisoned(address)))
        return 0;
    if (!python && !atomic_load_explicit(&port->record_all, memory_order_relaxed) && !record.error)
        return 1;
    record.message.arg.pagefault.feat.ptid = (uint32_t)syscall(SYS_gettid);
    if (!python) {
        /* Resolved and counted; without memory, the `after` hooks are not told. */
        uffdaemon_queue_offer(&port->queue, &record, uffdaemon_now());
        uffdaemon_port_notify(port);
        return 1;
    }
    if (record.error == EAGAIN)
        return 1;
    waiter.page = uffdaemon_page_of(address);
    /* Before Python can see the fault, so that no wake-up is missed. */
    uffdaemon_wait_queue_add(&port->waiting, &waiter);
    if (!uffdaemon_queue_offer(&port->queue, &record, record.latency)) {
        uffdaemon_wait_queue_remove(&port->waiting, &waiter);
        nanosleep(&(struct timespec){0, NO_MEMORY_NS}, NULL);
        return 1; /* it faults again, and there may be memory then */
    }
    uffdaemon_port_notify(port);
    /* A waiting thread delays only the removal of its own port. */
    atomic_fetch_add(&port->inside, 1);
    uffdaemon_read_unlock(&readers, *ticket);
    uffdaemon_wait_queue_wait(&port->waiting, &waiter, &port->closing);
    atomic_fetch_sub(&port->inside, 1);
    return 2;
}

/* Whether to retry an access that belongs to no port: its range may have been unregistered since
 * the fault.  If it faults again although no table has been replaced, it was never ours. */
static int may_have_been_ours(uint64_t address)
{
    /* Initial-exec: the first use of any other may allocate. */
    static _Thread_local struct {
        uint64_t address, replaced;
    } repeated __attribute__((tls_model("initial-exec")));
    uint64_t replaced = atomic_load(&uffdaemon_tables_replaced);

    if (repeated.address == address && repeated.replaced == replaced) {
        repeated.address = 0;
        return 0;
    }
    repeated.address = address;
    repeated.replaced = replaced;
    return 1;
}

static UFFDAEMON_HOT void on_bus_error(int number, siginfo_t *info, void *context)
{
    int error = errno, ours = 0;
    uint64_t address = (uint64_t)(uintptr_t)info->si_addr;

    if (info->si_code == BUS_ADRERR) {
        unsigned ticket = uffdaemon_read_lock(&readers);
        struct uffdaemon_port *port = atomic_load(&ports);

        for (struct uffdaemon_port *each = port; each; each = atomic_load(&each->next))
            uffdaemon_wait_for_events(each);
        for (; port && !ours; port = ours ? NULL : atomic_load(&port->next))
            if (address >= atomic_load_explicit(&port->rules.low, memory_order_relaxed) &&
                address < atomic_load_explicit(&port->rules.high, memory_order_relaxed))
                ours = resolve_or_wait(port, address, context, &ticket);
        if (ours != 2)
            uffdaemon_read_unlock(&readers, ticket);
    }
    if (!ours && info->si_code == BUS_ADRERR && may_have_been_ours(address))
        ours = 1;
    if (!ours) {
        for (unsigned index = 0; index < ENDED; index++)
            if (info->si_code == BUS_ADRERR &&
                address >= atomic_load_explicit(&ended[index].low, memory_order_relaxed) &&
                address < atomic_load_explicit(&ended[index].high, memory_order_relaxed)) {
                report(address, atomic_load(&ended[index].of_parent)
                                    ? "this memory is not served in a forked child"
                                    : "the daemon that served this memory has ended");
                break;
            }
        uffdaemon_sigaction_chain(number, info, context);
    }
    errno = error;
}

static void note_end(const struct uffdaemon_port *port, uint32_t of_parent)
{
    unsigned at = ended_count++ % ENDED;

    atomic_store(&ended[at].low, atomic_load(&port->rules.low));
    atomic_store(&ended[at].high, atomic_load(&port->rules.high));
    atomic_store(&ended[at].of_parent, of_parent);
}

/* In a forked child: the ports are the parent's, and are not served here.  Locks may be held, and
 * ports read, by threads that the child does not have.  It may add ports of its own. */
static void in_child(void)
{
    for (struct uffdaemon_port *port = atomic_load(&ports); port; port = atomic_load(&port->next))
        note_end(port, 1);
    atomic_store(&ports, NULL);
    atomic_store(&adding, 0);
    atomic_store(&readers.inside[0], 0);
    atomic_store(&readers.inside[1], 0);
}

/* From now on, faulting threads resolve their faults by the rules of `port`.  0 or -errno. */
int uffdaemon_sigbus_add(struct uffdaemon_port *port)
{
    int error;

    uffdaemon_spin_lock(&adding);
    error = uffdaemon_sigaction_install(on_bus_error, in_child);
    if (!error) {
        atomic_store(&port->in_thread, 1);
        port->next = ports;
        atomic_store(&ports, port);
    }
    uffdaemon_spin_unlock(&adding);
    return error;
}

/* Undoes this.  Threads that wait are released, and get SIGBUS. */
void uffdaemon_sigbus_remove(struct uffdaemon_port *port)
{
    struct timespec pause = {0, 100000};
    struct uffdaemon_port *_Atomic *at;

    if (port->process != getpid())
        return; /* the parent's, in a forked child */
    uffdaemon_spin_lock(&adding);
    for (at = &ports; *at; at = &(*at)->next)
        if (*at == port) {
            atomic_store(at, port->next);
            break;
        }
    note_end(port, 0);
    uffdaemon_spin_unlock(&adding);
    atomic_store(&port->closing, 1);
    uffdaemon_synchronize(&readers);
    uffdaemon_wait_queue_wake(&port->waiting, 0, UINT64_MAX);
    while (atomic_load(&port->inside))
        nanosleep(&pause, NULL);
}
