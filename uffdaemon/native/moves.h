/* SPDX-License-Identifier: Apache-2.0 */
/* Moving ranges, and copying one exactly where pages cannot be moved. */
#ifndef UFFDAEMON_MOVES_H
#define UFFDAEMON_MOVES_H

#include <stddef.h>
#include <stdint.h>

/* The stage at which a copy stopped. */
enum uffdaemon_stage {
    UFFDAEMON_STAGE_PROTECT = 1,
    UFFDAEMON_STAGE_COPY = 2,
    UFFDAEMON_STAGE_RELEASE = 3,
    UFFDAEMON_STAGE_UNPROTECT = 4, /* destination or source are still write-protected */
};

enum uffdaemon_copy_flags {
    UFFDAEMON_EXACT = 1, /* write-protect during the copy: both are registered MISSING | WP */
    UFFDAEMON_OTHER_PROCESS = 2, /* the destination is in another process */
    UFFDAEMON_SHARED = 4,        /* the destination is a file mapping */
};

/* What `uffdaemon_move_many` returns when it has moved nothing. */
#define UFFDAEMON_MOVE_OUTSIDE UINT64_MAX         /* a source lies outside the given range */
#define UFFDAEMON_MOVE_UNALIGNED (UINT64_MAX - 1) /* a triple is empty, or not whole pages */

/* A copy in place of a move: the source is released where it was copied. */
struct uffdaemon_copy {
    uint64_t dst, src, length; /* bytes */
    uint32_t flags;            /* enum uffdaemon_copy_flags */
    uint32_t advice;           /* MADV_* that empties the source */
    uint64_t done;             /* out: bytes copied and released */
    uint32_t error;            /* out: 0, or the errno that stopped it */
    uint32_t stage;            /* out: enum uffdaemon_stage, where error is not 0 */
};

uint64_t uffdaemon_move_many(int fd, const uint64_t *moves, uint64_t *done, size_t count,
                             uint64_t mode, uint64_t low, uint64_t high);
uint64_t uffdaemon_move(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode);
void uffdaemon_copy_and_release(int fd, int src_fd, struct uffdaemon_copy *copy);

#endif
