/* What tests need from outside of Python: surviving SIGBUS, and racing without the GIL. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static __thread sigjmp_buf escape;
static __thread volatile int code;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    code = info->si_code;
    siglongjmp(escape, 1);
}

/* Touches one byte; returns 0, or the si_code of the SIGBUS that it got. */
int touch(uint64_t address, int write)
{
    struct sigaction action, previous;
    volatile unsigned char *byte = (volatile unsigned char *)(uintptr_t)address;

    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, &previous);
    code = 0;
    if (sigsetjmp(escape, 1) == 0) {
        if (write)
            __atomic_fetch_add(byte, 0, __ATOMIC_RELAXED);
        else
            (void)*byte;
    }
    sigaction(SIGBUS, &previous, NULL);
    return code;
}

/* Adds 1 to the first word of a page chosen at random, `rounds` times, and to its word in `added`.
 * Other threads may be doing the same. */
void increment(uint64_t start, uint64_t page_size, uint64_t pages, uint64_t rounds, uint64_t seed,
               uint64_t *added)
{
    while (rounds--) {
        uint64_t page;

        seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
        page = (seed >> 33) % pages;
        __atomic_fetch_add((uint64_t *)(uintptr_t)(start + page * page_size), 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&added[page], 1, __ATOMIC_RELAXED);
    }
}

/* Forks, without the GIL, since fork(2) waits until its event has been read.  The child waits for a
 * byte from `go`, writes the first word of each page to `out`, waits for another byte and ends.
 * Returns its process id, or -1. */
long fork_and_read(const uint64_t *addresses, uint64_t count, int go, int out)
{
    long child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    uint64_t word;
    char byte;

    if (child)
        return child;
    if (read(go, &byte, 1) == 1)
        for (uint64_t page = 0; page < count; page++) {
            word = *(volatile uint64_t *)(uintptr_t)addresses[page];
            if (write(out, &word, sizeof(word)) != sizeof(word))
                break;
        }
    (void)!read(go, &byte, 1);
    syscall(SYS_exit_group, 0);
    return 0;
}

/* Forks by fork(3), which holds malloc's locks until the event has been read, and waits for each child.
 * Returns how many there were. */
long fork_often(long rounds)
{
    long done;

    for (done = 0; done < rounds; done++) {
        pid_t child = fork();

        if (child < 0)
            break;
        if (child == 0)
            _exit(0);
        waitpid(child, NULL, 0);
    }
    return done;
}

/* Discards a range again and again until `stop` is set.  Returns how often. */
long discard_until(uint64_t start, uint64_t length, const volatile int *stop)
{
    long done;

    for (done = 0; !*stop; done++)
        madvise((void *)(uintptr_t)start, length, MADV_DONTNEED);
    return done;
}
