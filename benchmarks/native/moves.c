/*
 * The yardsticks for moves, in C and without the library: loops of UFFDIO_MOVE and of UFFDIO_COPY,
 * reading straight into memory, a handler that answers each fault with one MOVE, and the threads
 * that touch and that just run.  A shared library, called through ctypes, which lets go of the GIL.
 */
#include "moves.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shared.h"
#include "uffd.h"

int64_t moves_each(int uffd, const uint64_t (*moves)[3], size_t count)
{
    uint64_t begun = nanoseconds();

    for (size_t index = 0; index < count; index++) {
        struct bench_move move = {moves[index][0], moves[index][1], moves[index][2], 0, 0};
        if (ioctl(uffd, BENCH_IOC_MOVE, &move))
            return -errno;
    }
    return (int64_t)(nanoseconds() - begun);
}

int64_t moves_fill_by_copy(int uffd, uint64_t dst, const char *src, uint64_t length, uint64_t piece)
{
    uint64_t begun = nanoseconds();

    for (uint64_t at = 0; at < length; at += piece) {
        struct bench_copy copy = {dst + at, (uint64_t)(uintptr_t)src + at, piece, 0, 0};
        if (ioctl(uffd, BENCH_IOC_COPY, &copy))
            return -errno;
    }
    return (int64_t)(nanoseconds() - begun);
}

int64_t moves_fill_by_read(int file, uint64_t dst, uint64_t length, uint64_t piece)
{
    uint64_t begun = nanoseconds();

    for (uint64_t at = 0; at < length; at += piece) {
        char *target = (char *)(uintptr_t)(dst + at);
        if (pread(file, target, piece, (off_t)at) != (ssize_t)piece)
            return errno ? -errno : -EIO;
    }
    return (int64_t)(nanoseconds() - begun);
}

int64_t moves_touch(uint64_t start, uint64_t length, int core)
{
    uint64_t begun, sum = 0;

    pin(core);
    begun = nanoseconds();
    for (uint64_t at = 0; at < length; at += BENCH_PAGE)
        sum += *(volatile uint64_t *)(uintptr_t)(start + at);
    return sum ? (int64_t)(nanoseconds() - begun) : -ENODATA;
}

int moves_answer(int uffd, int stop, uint64_t dst, uint64_t src, uint64_t window, int core)
{
    struct pollfd polled[] = {{uffd, POLLIN, 0}, {stop, POLLIN, 0}};
    struct bench_message messages[16];

    pin(core);
    for (;;) {
        ssize_t bytes;

        if (poll(polled, 2, -1) < 0)
            return -errno;
        if (polled[1].revents)
            return 0;
        bytes = read(uffd, messages, sizeof(messages));
        for (ssize_t at = 0; at < bytes; at += (ssize_t)sizeof(messages[0])) {
            uint64_t offset = messages[at / (ssize_t)sizeof(messages[0])].address - dst;
            struct bench_move move = {0, 0, window, 0, 0};

            offset -= offset % window;
            move.dst = dst + offset;
            move.src = src + offset;
            if (ioctl(uffd, BENCH_IOC_MOVE, &move))
                return -errno;
        }
    }
}

void moves_run(const volatile int *stop, int core)
{
    pin(core);
    while (!*stop)
        ;
}
