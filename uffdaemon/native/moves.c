/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moving many ranges in one call, and copying one exactly where pages cannot be moved.
 *
 * The exact copy keeps both sides read-only and identical while both exist:
 *   WRITEPROTECT(src), COPY(dst, WP | DONTWAKE), DONTNEED(src), un-WRITEPROTECT(dst)
 * so that no write is lost, and src is never older than dst.
 */
#define _GNU_SOURCE
#include "moves.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include "base.h"
#include "operations.h"

#define MADV_DONTNEED_LOCKED_ 24 /* MADV_DONTNEED_LOCKED, Linux 5.18 */
#define LONGEST (16u << 20)      /* bytes in one ioctl, so that none takes long */
#define PATIENCE 100000          /* rounds of 100 µs for a pending event: 10 s */

/* Finds how many (dst, src, length) triples from `first` on are contiguous, and their total length.
 * Returns the index after the last. */
static size_t join(const uint64_t *moves, size_t first, size_t count, uint64_t *length)
{
    const uint64_t *range = moves + 3 * first;
    size_t next = first + 1;

    *length = range[2];
    for (; next < count; next++) {
        const uint64_t *move = moves + 3 * next;

        if (move[0] != range[0] + *length || move[1] != range[1] + *length ||
            *length + move[2] > LONGEST)
            break;
        *length += move[2];
    }
    return next;
}

/* Whether all sources lie from `low` up to `high`. */
static int inside(const uint64_t *moves, size_t count, uint64_t low, uint64_t high)
{
    for (size_t index = 0; index < count; index++) {
        uint64_t src = moves[3 * index + 1], length = moves[3 * index + 2];

        if (src < low || src > high || length > high - src)
            return 0;
    }
    return 1;
}

/* Whether all triples are whole pages, at least one each. */
static int aligned(const uint64_t *moves, size_t count)
{
    uint64_t in_page = uffdaemon_page_size() - 1;

    for (size_t index = 0; index < count; index++) {
        const uint64_t *move = moves + 3 * index;

        if (((move[0] | move[1] | move[2]) & in_page) || move[2] == 0)
            return 0;
    }
    return 1;
}

/* Moves each (dst, src, length) as far as it goes; done[i] is the number of bytes moved.
 * Contiguous triples share an ioctl.  Returns how many bytes were not moved.  Moves nothing and
 * returns UFFDAEMON_MOVE_OUTSIDE if a source does not lie from `low` up to `high`, or
 * UFFDAEMON_MOVE_UNALIGNED if a triple is not whole pages. */
uint64_t uffdaemon_move_many(int fd, const uint64_t *moves, uint64_t *done, size_t count,
                             uint64_t mode, uint64_t low, uint64_t high)
{
    uint64_t left = 0;

    if (!aligned(moves, count))
        return UFFDAEMON_MOVE_UNALIGNED;
    if (!inside(moves, count, low, high))
        return UFFDAEMON_MOVE_OUTSIDE;
    for (size_t first = 0, next; first < count; first = next) {
        struct uffdaemon_operation operation = {.code = _UFFDIO_MOVE, .mode = mode};
        uint64_t moved;

        next = join(moves, first, count, &operation.length);
        operation.dst = moves[3 * first];
        operation.src = moves[3 * first + 1];
        uffdaemon_carry_out(fd, &operation, NULL, 0);
        moved = operation.done;
        left += operation.length - moved;
        for (size_t index = first; index < next; index++) {
            uint64_t length = moves[3 * index + 2];

            done[index] = moved < length ? moved : length;
            moved -= done[index];
        }
    }
    return left;
}

/* Moves one range as far as it goes; returns the number of bytes moved. */
uint64_t uffdaemon_move(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode)
{
    struct uffdaemon_operation operation = {
        .code = _UFFDIO_MOVE, .dst = dst, .src = src, .length = length, .mode = mode};

    uffdaemon_carry_out(fd, &operation, NULL, 0);
    return operation.done;
}

static int protect(int fd, uint64_t start, uint64_t length, uint64_t mode)
{
    struct uffdio_writeprotect argument = {{start, length}, mode};
    return ioctl(fd, UFFDIO_WRITEPROTECT, &argument) ? errno : 0;
}

/* Removes the write-protection.  A pending event delays this until it is read.  Do not give up
 * early: the range would stay read-only. */
static int unprotect(int fd, uint64_t start, uint64_t length)
{
    const struct timespec pause = {0, 100000};
    int error = protect(fd, start, length, 0);

    for (int round = 0; error == EAGAIN && round < PATIENCE; round++) {
        nanosleep(&pause, NULL);
        error = protect(fd, start, length, 0);
    }
    return error;
}

static int release(uint64_t start, uint64_t length, int advice)
{
    void *range = (void *)(uintptr_t)start;

    if (madvise(range, length, advice) == 0)
        return 0;
    /* mlocked memory is released only by MADV_DONTNEED_LOCKED. */
    if (errno == EINVAL && advice == MADV_DONTNEED &&
        madvise(range, length, MADV_DONTNEED_LOCKED_) == 0)
        return 0;
    return errno;
}

static void fail(struct uffdaemon_copy *copy, enum uffdaemon_stage stage, int error)
{
    if (copy->error == 0 && error != 0) {
        copy->stage = stage;
        copy->error = (uint32_t)error;
    }
}

/* Copies as far as it goes, releases that much of the source, and stores what stopped it. */
void uffdaemon_copy_and_release(int fd, int src_fd, struct uffdaemon_copy *copy)
{
    struct uffdaemon_operation operation = {
        .code = _UFFDIO_COPY, .dst = copy->dst, .src = copy->src, .length = copy->length};
    int exact = copy->flags & UFFDAEMON_EXACT, error;

    copy->error = copy->stage = 0;
    copy->done = 0;
    if (exact) {
        error = protect(src_fd, copy->src, copy->length, UFFDIO_WRITEPROTECT_MODE_WP);
        if (error) {
            fail(copy, UFFDAEMON_STAGE_PROTECT, error);
            /* Earlier parts of the range may have changed. */
            unprotect(src_fd, copy->src, copy->length);
            return;
        }
        operation.mode = UFFDIO_COPY_MODE_WP | UFFDIO_COPY_MODE_DONTWAKE;
    }
    uffdaemon_carry_out(fd, &operation, NULL, 0);
    fail(copy, UFFDAEMON_STAGE_COPY, (int)operation.error);
    copy->done = operation.done;
    if (copy->done) {
        error = release(copy->src, copy->done, (int)copy->advice);
        fail(copy, UFFDAEMON_STAGE_RELEASE, error);
        /* Undo the copy, or each page would exist twice. */
        if (error && !(copy->flags & UFFDAEMON_OTHER_PROCESS))
            release(copy->dst, copy->done,
                    copy->flags & UFFDAEMON_SHARED ? MADV_REMOVE : MADV_DONTNEED);
        if (error)
            copy->done = 0;
    }
    if (!exact)
        return;
    /* Needed even for pages that are gone: it wakes waiting writers, and removes the markers that
     * shared memory keeps. */
    fail(copy, UFFDAEMON_STAGE_UNPROTECT, unprotect(src_fd, copy->src, copy->length));
    if (operation.done)
        fail(copy, UFFDAEMON_STAGE_UNPROTECT, unprotect(fd, copy->dst, operation.done));
}
