/* SPDX-License-Identifier: Apache-2.0 */
/* The ioctls that resolve faults. */
#ifndef UFFDAEMON_OPERATIONS_H
#define UFFDAEMON_OPERATIONS_H

#include <stddef.h>
#include <stdint.h>

#include "record.h"

/* One ioctl to carry out, and its outcome.  64 bytes, packed and read by Python's struct. */
struct uffdaemon_operation {
    uint32_t code;      /* _UFFDIO_COPY, _UFFDIO_MOVE, ... */
    uint32_t error;     /* out: 0, or the errno that stopped the operation */
    uint64_t dst;       /* bytes; the start of the range for operations without a source */
    uint64_t src;       /* bytes; 0 for operations without a source */
    uint64_t length;    /* bytes */
    uint64_t mode;      /* the ioctl's own mode bits */
    uint64_t page_size; /* bytes; how far to skip a page that is present, 0: stop there */
    uint64_t done;      /* out: bytes that this operation filled, moved or changed */
    uint64_t present;   /* out: bytes that were present already, and woken unless DONTWAKE */
};
_Static_assert(sizeof(struct uffdaemon_operation) == 64, "uffdaemon_operation");

void uffdaemon_execute(int fd, struct uffdaemon_operation *operations, size_t count);
void uffdaemon_carry_out(int fd, struct uffdaemon_operation *operation,
                         struct uffdaemon_record *records, size_t count);

#endif
