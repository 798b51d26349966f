/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the watchdog does about who waits: a line, the thread's Python stack, and what was declared.
 *
 * Lines are kept until the watchdog's lock is free: a disk may be slow, and so may the thread that is
 * asked for its stack.  That thread writes to a pipe of ours, which never blocks it.
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

#define STACK_NS 2000000000 /* the longest wait for a stack, on a machine that is busy */
#define LOOK_NS 1000000
#define LARGEST_HUGE_PAGE (UINT64_C(16) << 30) /* arm64 with pages of 64 KiB */

/* What is to be written: the watchdog's own thread uses them. */
static struct {
    struct uffdaemon_line line;
    uint32_t thread; /* whose stack is wanted; 0: nobody's */
    int signal;
    int in_handler;
} pending[UFFDAEMON_REPORTED];
static size_t pending_count;
static int exiting;
static _Atomic int stacks = -1; /* the read end of faulthandler's pipe */

/* What is in the way, as a line ends. */
static const char *const reasons[] = {
    [UFFDAEMON_STALL_OWNER_ENDED] = ": whoever guarded this memory has ended",
    [UFFDAEMON_STALL_NOT_DEQUEUED] = ": Python does not take the fault in; whoever holds the GIL, "
                                     "or keeps trio's loop busy, may "
                                     "be that very thread",
    [UFFDAEMON_STALL_OUTSTANDING] = ": Python has taken the fault in, and has not come to an end "
                                    "with it; a policy or a hook may "
                                    "wait for that very thread",
};

/* Keeps a line until `uffdaemon_stall_write`; of `thread`, unless 0, the stack as well. */
static void keep(const struct uffdaemon_watch *watch, struct uffdaemon_line *line, uint32_t thread)
{
    if (pending_count == UFFDAEMON_REPORTED) {
        uffdaemon_line_write(line);
        return;
    }
    pending[pending_count].line = *line;
    pending[pending_count].thread = watch->stacks ? thread : 0;
    pending[pending_count].signal = watch->stacks;
    /* Who waits in its signal handler, in futex(2), has this signal unblocked. */
    pending[pending_count].in_handler = watch->port &&
                                        !uffdaemon_wait_queue_empty(&watch->port->waiting);
    pending_count++;
}

static void say(const struct uffdaemon_watch *watch, const struct uffd_msg *message, uint64_t age,
                enum uffdaemon_stall stall)
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
    keep(watch, &line, message->arg.pagefault.feat.ptid);
}

/* Its pages are asked for at a userfaultfd of its own, which nobody serves yet. */
static void say_child(const struct uffdaemon_watch *watch, uint64_t age)
{
    struct uffdaemon_line line = {.length = 0};

    uffdaemon_line_add(&line, "uffdaemon: a forked child that shares ");
    uffdaemon_line_add(&line, watch->name);
    uffdaemon_line_add(&line, " has not been taken in for ");
    uffdaemon_line_add_number(&line, age / 1000000, 10);
    uffdaemon_line_add(&line, " ms");
    uffdaemon_line_add(&line, watch->port ? ": whoever waits for it may keep trio's loop from that"
                                          : reasons[UFFDAEMON_STALL_OWNER_ENDED]);
    keep(watch, &line, 0);
}

/* Has the page poisoned; its thread gets SIGBUS. */
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
            continue; /* made of larger pages, it may be */
        if (watch->port)
            uffdaemon_wait_queue_wake(&watch->port->waiting, operation.dst, operation.length);
        return;
    }
}

static int reported(struct uffdaemon_watch *watch, uint64_t address)
{
    for (size_t index = 0; index < UFFDAEMON_REPORTED; index++)
        if (watch->reported[index] == address)
            return 1;
    watch->reported[watch->reported_count++ % UFFDAEMON_REPORTED] = address;
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

/* Whether a thread has not taken a signal yet, or is in its handler, which blocks it, or runs: between
 * the two it does, and afterwards, until it waits again.  See proc_pid_status(5). */
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

/* Has faulthandler write the Python stack of a thread, by that thread: nobody else changes it. */
static void ask_for_stack(uint32_t thread, int signal, int in_handler)
{
    struct timespec pause = {0, LOOK_NS};

    if (!thread || !(in_handler || in_user_mode(thread)))
        return;
    syscall(SYS_tgkill, getpid(), thread, signal);
    for (int64_t left = STACK_NS; left > 0 && is_handling(thread, signal); left -= LOOK_NS)
        nanosleep(&pause, NULL);
}

/* Hands on what threads have written of their stacks. */
static void write_stacks(void)
{
    char text[8192];
    ssize_t length;

    while ((length = read(atomic_load(&stacks), text, sizeof(text))) > 0)
        uffdaemon_write_errors(text, (size_t)length);
}

/* Threads write their stacks to a pipe, of which `fd` is the end to read from, without blocking. */
void uffdaemon_stacks_from(int fd)
{
    atomic_store(&stacks, fd);
}

/* In a forked child: what the parent reported is the parent's to write. */
void uffdaemon_stall_forget(void)
{
    pending_count = 0;
    exiting = 0;
}

/* Writes what was reported, without the watchdog's lock, and ends the process if that was declared. */
void uffdaemon_stall_write(void)
{
    for (size_t index = 0; index < pending_count; index++) {
        uffdaemon_line_write(&pending[index].line);
        ask_for_stack(pending[index].thread, pending[index].signal, pending[index].in_handler);
        write_stacks();
    }
    pending_count = 0;
    if (exiting)
        _exit(UFFDAEMON_EXIT_STATUS);
}

/* Reports who waits, unless that was done before, and does what was declared. */
void uffdaemon_stall_report(struct uffdaemon_watch *watch, const struct uffd_msg *messages,
                            size_t count, uint64_t age, enum uffdaemon_stall stall)
{
    int news = 0;

    for (size_t index = 0; index < count; index++)
        if (messages[index].event == UFFD_EVENT_PAGEFAULT &&
            !reported(watch, messages[index].arg.pagefault.address)) {
            say(watch, &messages[index], age, stall);
            news = 1;
        } else if (messages[index].event == UFFD_EVENT_FORK &&
                   !reported(watch, messages[index].arg.fork.ufd)) {
            say_child(watch, age);
            news = 1;
        }
    if (watch->then == UFFDAEMON_EXIT && news)
        exiting = 1;
    for (size_t index = 0; watch->then == UFFDAEMON_POISON && index < count; index++)
        if (messages[index].event == UFFD_EVENT_PAGEFAULT && watch->doomed_count < UFFDAEMON_LOOK)
            watch->doomed[watch->doomed_count++] = messages[index].arg.pagefault.address;
}

/* Has threads that wait in a range fault again, whose messages have been read before. */
void uffdaemon_watch_wake(const struct uffdaemon_watch *watch, uint64_t start, uint64_t length)
{
    struct uffdaemon_operation operation = {.code = _UFFDIO_WAKE, .dst = start, .length = length};

    uffdaemon_execute(watch->fd, &operation, 1);
}

/* Once the report has been written: what was declared, and waking those whose messages the watchdog has
 * read.  A thread must not run before: its stack is that of the access. */
void uffdaemon_stall_act(struct uffdaemon_watch *watch)
{
    while (watch->reread_count)
        uffdaemon_watch_wake(watch, uffdaemon_page_of(watch->reread[--watch->reread_count]),
                             uffdaemon_page_size());
    while (watch->doomed_count)
        poison(watch, watch->doomed[--watch->doomed_count]);
}
