/* Threads that get in the way of moves. */
#include "soak.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Children share every page for as long as they live, and leave it marked as shared. */
void soak_fork(struct soak *soak)
{
    const struct timespec stay = {0, (long)soak->lingering};

    while (!stopped(soak)) {
        pid_t child = fork();

        if (child == 0) {
            if (soak->forks & 1)
                nanosleep(&stay, NULL);
            _exit(0);
        }
        if (child > 0 && waitpid(child, NULL, 0) == child)
            soak->forks++;
        sched_yield();
    }
}

/* Reads blocks of a file into a page without the page cache: what the device delivers must be in
 * the page afterwards, wherever that is by then. */
void soak_direct(struct soak *soak)
{
    uint64_t seed = 5;

    while (!stopped(soak)) {
        unsigned slot = (unsigned)next_random(&seed);
        uint64_t block = next_random(&seed) % DIRECT_BLOCKS;
        void *target = word_of(soak, slot, DIRECT, 0);

        if (pread(soak->file, target, PAGE, (off_t)(block * PAGE)) != PAGE)
            continue;
        for (unsigned byte = 0; byte < PAGE; byte += 512)
            if (*word_of(soak, (unsigned)next_random(&seed), DIRECT, byte) != block + 1)
                __atomic_fetch_add(&soak->wrong, 1, __ATOMIC_RELAXED);
        soak->directs++;
    }
}

/* Pins a page for a while, as a registered buffer.  Returns 0, or errno if there is no io_uring. */
int soak_ring(struct soak *soak)
{
    struct io_uring_params parameters;
    uint64_t seed = 9;
    int ring;

    memset(&parameters, 0, sizeof(parameters));
    ring = (int)syscall(SYS_io_uring_setup, 1, &parameters);
    if (ring < 0)
        return errno;
    while (!stopped(soak)) {
        struct iovec page = {word_of(soak, (unsigned)next_random(&seed), RING, 0), PAGE};

        if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &page, 1) != 0)
            continue;
        soak->rings++;
        for (int round = 0; round < 50; round++)
            sched_yield();
        syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0);
        for (int round = 0; round < 50; round++)
            sched_yield();
    }
    close(ring);
    return 0;
}

/* Has the pages swapped out, where there is swap. */
void soak_pageout(struct soak *soak)
{
    while (!stopped(soak)) {
        for (unsigned slot = 0; slot < 2; slot++)
            for (unsigned page = 0; page < PAGES; page++)
                if (madvise(word_of(soak, slot, page, 0), PAGE, MADV_PAGEOUT) == 0)
                    soak->pageouts++;
        sched_yield();
    }
}
