/* SPDX-License-Identifier: Apache-2.0 */
/* A message of a userfaultfd, and what became of it. */
#ifndef UFFDAEMON_RECORD_H
#define UFFDAEMON_RECORD_H

#include <stdint.h>

#include "uapi.h"

/* 64 bytes, read by Python's struct. */
struct uffdaemon_record {
    struct uffd_msg message;
    uint32_t code;    /* 0: forwarded to Python; else the operation that resolved the fault */
    uint32_t present; /* of faults: whether the page was present before; of events: applied in C */
    uint64_t latency; /* when it was read, CLOCK_MONOTONIC ns; once resolved: ns until it was */
    uint64_t done;    /* bytes that the operation filled, in the first record that it resolves */
    uint64_t error;   /* errno that kept a rule from resolving it, 0: none */
};
_Static_assert(sizeof(struct uffdaemon_record) == 64, "uffdaemon_record");

#endif
