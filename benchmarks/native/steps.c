/*
 * One resolved fault, an instruction at a time: the registers before each instruction that a thread
 * runs in user space, for benchmarks/touched.py.  A shared library, called through ctypes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>

#include <linux/elf.h>

#define MESSAGE 32     /* bytes of a struct uffd_msg */
#define SYSCALL 0x050f /* the instruction, as it lies in memory */
#define SIGNAL_DEADLINE 50000000
#define DEADLINE 2000000000 /* nanoseconds until no fault is expected any more */

struct trace {
    struct user_regs_struct *steps;
    size_t capacity;
    uint64_t vdso, vdso_end; /* where the traced process has it */
};

/* All of these return a count or 0, or -errno; -ETIME when no fault came. */

/* From the end of a read(2) that brought a message to the end of the next one that does. */
long steps_of_read(int thread, struct trace *trace);

/* From a handler of SIGBUS's first instruction to its return, in whichever of the threads. */
long steps_of_signal(const int *threads, size_t count, struct trace *trace);

static uint64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

/* The status of a stop; 0: there is none yet; or -errno. */
static int stopped(int thread, int flags)
{
    int status = 0;
    int found = waitpid(thread, &status, __WALL | flags);

    if (found < 0)
        return -errno;
    if (found == 0)
        return 0;
    return WIFSTOPPED(status) ? status : -ESRCH;
}

/* The status of the next stop, which is not slept for: two wake-ups a step would be most of it. */
static int wait_for(int thread)
{
    uint64_t end = nanoseconds() + DEADLINE;
    int status = stopped(thread, WNOHANG);

    while (status == 0 && nanoseconds() < end)
        status = stopped(thread, WNOHANG);
    return status ? status : -ETIME;
}

static int go_on(int request, int thread, int signal_number)
{
    if (ptrace(request, thread, NULL, (void *)(intptr_t)signal_number))
        return -errno;
    return wait_for(thread);
}

static int is_message(long result)
{
    return result > 0 && result % MESSAGE == 0;
}

/* Messages are read by either of the two. */
static int is_call(long number, long wanted)
{
    return number == wanted || (wanted == SYS_read && number == SYS_preadv2);
}

/* Has the clock say `clock` that the thread has just asked the vDSO for; `moment` is what for. */
static void set_clock(int thread, uint64_t moment, uint64_t clock)
{
    struct timespec now = {(time_t)(clock / 1000000000), (long)(clock % 1000000000)};
    struct iovec from = {&now, sizeof(now)}, to = {(void *)(uintptr_t)moment, sizeof(now)};

    process_vm_writev(thread, &from, 1, &to, 1, 0);
}

/* Steps until `last` has been called, with a result that counts, so many `times`; what comes after the
 * last time but one is kept.  How many steps that is.  Steps take a thousand times what they take
 * else, which the thread must not notice: its clock goes on by a nanosecond each. */
static long record(int thread, struct trace *trace, long last, int times)
{
    uint64_t begun = nanoseconds(), clock = begun, moment = 0;

    for (size_t count = 0; count < trace->capacity; count++, clock++) {
        struct user_regs_struct *step = &trace->steps[count];
        long instruction;
        int status, in_vdso;

        if (ptrace(PTRACE_GETREGS, thread, NULL, step))
            return -errno;
        if (count % 1024 == 1023 && nanoseconds() - begun > DEADLINE)
            return -ETIME;
        in_vdso = step->rip >= trace->vdso && step->rip < trace->vdso_end;
        if (in_vdso && !moment)
            moment = step->rsi;
        else if (!in_vdso && moment) {
            set_clock(thread, moment, clock);
            moment = 0;
        }
        errno = 0;
        instruction = ptrace(PTRACE_PEEKTEXT, thread, (void *)step->rip, NULL);
        if (errno)
            return -errno;
        status = go_on(PTRACE_SINGLESTEP, thread, 0);
        if (status < 0)
            return status;
        if ((instruction & 0xffff) == SYSCALL && is_call((long)step->rax, last)) {
            struct user_regs_struct after;

            if (ptrace(PTRACE_GETREGS, thread, NULL, &after))
                return -errno;
            if (last == SYS_read && !is_message((long)after.rax))
                continue;
            if (--times == 0)
                return (long)count + 1;
            count = (size_t)-1;
        } else if (times > 1 && count + 1 == trace->capacity) {
            count = (size_t)-1; /* nothing of this is kept */
        }
    }
    return -ENOSPC;
}

static int seize(int thread)
{
    return ptrace(PTRACE_SEIZE, thread, NULL, (void *)PTRACE_O_TRACESYSGOOD) ? -errno : 0;
}

static void let_go(int thread)
{
    int status;

    if (ptrace(PTRACE_INTERRUPT, thread, NULL, NULL) == 0) {
        status = wait_for(thread);
        if (status > 0) {
            int number = WSTOPSIG(status);
            if (status >> 16 || number == SIGTRAP || number == (SIGTRAP | 0x80))
                number = 0;
            ptrace(PTRACE_DETACH, thread, NULL, (void *)(intptr_t)number);
        }
    }
}

long steps_of_read(int thread, struct trace *trace)
{
    long result = seize(thread);
    int status;

    if (result < 0)
        return result;
    ptrace(PTRACE_INTERRUPT, thread, NULL, NULL);
    status = wait_for(thread);
    result = status < 0 ? status : record(thread, trace, SYS_read, 2);
    if (ptrace(PTRACE_DETACH, thread, NULL, NULL))
        let_go(thread);
    return result;
}

long steps_of_signal(const int *threads, size_t count, struct trace *trace)
{
    const struct timespec pause = {0, 100000};
    uint64_t end = nanoseconds() + SIGNAL_DEADLINE;
    long result = -ETIME;
    int found = 0;

    for (size_t index = 0; index < count; index++)
        seize(threads[index]);
    while (!found && nanoseconds() < end) {
        for (size_t index = 0; index < count && !found; index++) {
            int status = stopped(threads[index], WNOHANG);

            if (status > 0 && WSTOPSIG(status) == SIGBUS && !(status >> 16))
                found = threads[index];
            else if (status > 0)
                ptrace(PTRACE_CONT, threads[index], NULL,
                       (void *)(intptr_t)(status >> 16 ? 0 : WSTOPSIG(status)));
        }
        if (!found)
            nanosleep(&pause, NULL);
    }
    if (found) {
        int status = go_on(PTRACE_SINGLESTEP, found, SIGBUS);

        result = status < 0 ? status : record(found, trace, SYS_rt_sigreturn, 1);
        if (ptrace(PTRACE_DETACH, found, NULL, NULL))
            let_go(found);
    }
    for (size_t index = 0; index < count; index++)
        if (threads[index] != found)
            let_go(threads[index]);
    return result;
}
