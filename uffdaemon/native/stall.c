/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the watchdog does about a stalled fault: it writes a line and the thread's Python stack, and
 * takes the declared action.
 *
 * Lines are queued, and written without the watchdog's lock: a disk may be slow, and so may the
 * thread whose stack is wanted.  That thread writes to a pipe, which never blocks it.
 */
#define _GNU_SOURCE
#include "stall.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base.h"
#include "operations.h"
#include "text.h"
#include "waitqueue.h"

#define STACK_NS 2000000000 /* longest wait for a stack, for busy machines */
#define POLL_NS 1000000
#define LARGEST_HUGE_PAGE (UINT64_C(16) << 30) /* arm64 with pages of 64 KiB */

/* What is to be written.  Private to the watchdog's thread. */
static struct {
    struct uffdaemon_line line;
    uint32_t thread; /* whose stack to write; 0: none */
    int signal;
    int in_handler;
} pending[UFFDAEMON_REPORTED];
static size_t pending_count;
static int exiting;
static _Atomic int stacks = -1; /* the read end of faulthandler's pipe */

/* The cause, at the end of a line. */
static const char *const reasons[] = {
    [UFFDAEMON_STALL_OWNER_ENDED] = ": the daemon that served this memory has ended",
    [UFFDAEMON_STALL_NOT_DEQUEUED] =
        ": Python has not dequeued the fault; the thread itself may be "
        "holding the GIL or keeping trio's loop busy",
    [UFFDAEMON_STALL_OUTSTANDING] = ": Python has dequeued the fault but not finished it; a policy "
                                    "or a hook may be waiting for the thread itself",
};

/* Queues a line for `uffdaemon_stall_write`, and the stack of `thread` unless that is 0. */
static void add_line(const struct uffdaemon_watch *watch, struct uffdaemon_line *line,
                     uint32_t thread)
{
    if (pending_count == UFFDAEMON_REPORTED) {
        uffdaemon_line_write(line);
        return;
    }
    pending[pending_count].line = *line;
    pending[pending_count].thread = watch->stacks ? thread : 0;
    pending[pending_count].signal = watch->stacks;
    /* A thread that waits in the SIGBUS handler, in futex(2), has this signal unblocked. */
    pending[pending_count].in_handler = watch->port &&
                                        !uffdaemon_wait_queue_empty(&watch->port->waiting);
    pending_count++;
}

static void report_fault(const struct uffdaemon_watch *watch, const struct uffd_msg *message,
                         uint64_t age, enum uffdaemon_stall stall)
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
    uffdaemon_line_add(&line, reasons[stall]);
    add_line(watch, &line, message->arg.pagefault.feat.ptid);
}

/* The child's faults go to a userfaultfd of its own, which is not served yet. */
static void report_child(const struct uffdaemon_watch *watch, uint64_t age)
{
    struct uffdaemon_line line = {.length = 0};

    uffdaemon_line_add(&line, "uffdaemon: a forked child that shares ");
    uffdaemon_line_add(&line, watch->name);
    uffdaemon_line_add(&line, " has not been served for ");
    uffdaemon_line_add_number(&line, age / 1000000, 10);
    uffdaemon_line_add(&line, " ms");
    uffdaemon_line_add(&line, watch->port
                                  ? ": the thread that waits for it may be keeping trio's loop busy"
                                  : reasons[UFFDAEMON_STALL_OWNER_ENDED]);
    add_line(watch, &line, 0);
}

/* Poisons the page: its threads get SIGBUS. */
static void poison(const struct uffdaemon_watch *watch, uint64_t address)
{
    for (uint64_t size = uffdaemon_page_size(); size <= LARGEST_HUGE_PAGE; size *= 2) {
        struct uffdaemon_operation operation = {
            .code = _UFFDIO_POISON,
            .dst = address & ~(size - 1),
            .length = size,
            .page_size = size,
        };

        uffdaemon_execute(watch->fd, &operation, 1);
        if (operation.error == EINVAL)
            continue; /* perhaps the memory has larger pages */
        if (watch->port)
            uffdaemon_wait_queue_wake(&watch->port->waiting, operation.dst, operation.length);
        return;
    }
}

/* Whether the address was reported before; it counts as reported from now on. */
static int reported(struct uffdaemon_watch *watch, uint64_t address)
{
    for (size_t index = 0; index < UFFDAEMON_REPORTED; index++)
        if (watch->reported[index] == address)
            return 1;
    watch->reported[watch->reported_count++ % UFFDAEMON_REPORTED] = address;
    return 0;
}

/* Whether a thread faulted in user mode: only then it handles signals while its page is missing.
 * See proc_pid_syscall(5). */
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

/* Whether a signal is pending for a thread, or blocked by its handler, or the thread runs: it does
 * between the two, and afterwards until it waits again.  See proc_pid_status(5). */
static int is_handling(uint32_t thread, int signal)
{
    static const char *const masks[] = {"\nSigPnd:", "\nSigBlk:"};
    char path[64], status[4096];
    uint64_t found = 0;
    ssize_t length;
    int fd;

    snprintf(path, sizeof(path), "/proc/self/task/%u/status", thread);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    length = read(fd, status, sizeof(status) - 1);
    close(fd);
    status[length > 0 ? length : 0] = 0;
    for (size_t index = 0; index < sizeof(masks) / sizeof(masks[0]); index++) {
        const char *mask = strstr(status, masks[index]);

        if (mask)
            found |= strtoull(mask + strlen(masks[index]), NULL, 16);
    }
    return strstr(status, "\nState:\tR") || (found >> (signal - 1) & 1);
}

/* Has faulthandler write a thread's Python stack.  The thread does so itself, so the stack is
 * stable. */
static void request_stack(uint32_t thread, int signal, int in_handler)
{
    struct timespec pause = {0, POLL_NS};

    if (!thread || !(in_handler || in_user_mode(thread)))
        return;
    syscall(SYS_tgkill, getpid(), thread, signal);
    for (int64_t left = STACK_NS; left > 0 && is_handling(thread, signal); left -= POLL_NS)
        nanosleep(&pause, NULL);
}

/* Copies the stacks that threads have written to standard error. */
static void write_stacks(void)
{
    char text[8192];
    ssize_t length;

    while ((length = read(atomic_load(&stacks), text, sizeof(text))) > 0)
        uffdaemon_write_errors(text, (size_t)length);
}

/* `fd` is the read end, nonblocking, of the pipe to which threads write their stacks. */
void uffdaemon_stall_set_stack_pipe(int fd)
{
    atomic_store(&stacks, fd);
}

/* In a forked child: the parent writes its own reports. */
void uffdaemon_stall_forget(void)
{
    pending_count = 0;
    exiting = 0;
}

/* Writes the queued reports, without the watchdog's lock; ends the process if that was declared. */
void uffdaemon_stall_write(void)
{
    for (size_t index = 0; index < pending_count; index++) {
        uffdaemon_line_write(&pending[index].line);
        request_stack(pending[index].thread, pending[index].signal, pending[index].in_handler);
        write_stacks();
    }
    pending_count = 0;
    if (exiting)
        _exit(UFFDAEMON_EXIT_STATUS);
}

/* Reports threads that wait, once each, and prepares the declared action. */
void uffdaemon_stall_report(struct uffdaemon_watch *watch, const struct uffd_msg *messages,
                            size_t count, uint64_t age, enum uffdaemon_stall stall)
{
    int news = 0;

    for (size_t index = 0; index < count; index++)
        if (messages[index].event == UFFD_EVENT_PAGEFAULT &&
            !reported(watch, messages[index].arg.pagefault.address)) {
            report_fault(watch, &messages[index], age, stall);
            news = 1;
        } else if (messages[index].event == UFFD_EVENT_FORK &&
                   !reported(watch, messages[index].arg.fork.ufd)) {
            report_child(watch, age);
            news = 1;
        }
    if (watch->then == UFFDAEMON_EXIT && news)
        exiting = 1;
    for (size_t index = 0; watch->then == UFFDAEMON_POISON && index < count; index++)
        if (messages[index].event == UFFD_EVENT_PAGEFAULT &&
            watch->doomed_count < UFFDAEMON_REPORT_MAX)
            watch->doomed[watch->doomed_count++] = messages[index].arg.pagefault.address;
}

/* Wakes threads in a range whose messages were read, so that they fault again. */
void uffdaemon_stall_wake(const struct uffdaemon_watch *watch, uint64_t start, uint64_t length)
{
    struct uffdaemon_operation operation = {.code = _UFFDIO_WAKE, .dst = start, .length = length};

    uffdaemon_execute(watch->fd, &operation, 1);
}

/* Takes the declared action and wakes the threads whose messages the watchdog has read.  Only
 * after the report has been written: a thread that runs has left the stack of its access. */
void uffdaemon_stall_act(struct uffdaemon_watch *watch)
{
    while (watch->reread_count)
        uffdaemon_stall_wake(watch, uffdaemon_page_of(watch->reread[--watch->reread_count]),
                             uffdaemon_page_size());
    while (watch->doomed_count)
        poison(watch, watch->doomed[--watch->doomed_count]);
}
