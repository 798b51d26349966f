/* SPDX-License-Identifier: Apache-2.0 */
/* A message of a userfaultfd, and its outcome. */
#ifndef UFFDAEMON_RECORD_H
#define UFFDAEMON_RECORD_H

#include <stdint.h>

#include "uapi.h"

struct uffdaemon_snapshot;

/* What C did about an event.  A port counts the events that it has examined. */
enum uffdaemon_applied {
    UFFDAEMON_APPLIED_NO = 0,
    UFFDAEMON_APPLIED = 1,
    UFFDAEMON_APPLIED_NOWHERE = 2, /* no rules: counted, and applied by Python */
};

/* 64 bytes, read by Python's struct. */
struct uffdaemon_record {
    struct uffd_msg message;
    uint32_t code;    /* 0: forwarded to Python; else the operation that resolved the fault */
    uint32_t present; /* fault: whether the page was present already; event:
                         enum uffdaemon_applied */
    uint64_t latency; /* when it was read, CLOCK_MONOTONIC ns; once resolved: ns that this took */
    uint64_t done;    /* bytes that the operation filled, in the first record that it resolves;
                         FORK: address of a struct uffdaemon_snapshot, owned by the receiver */
    uint64_t error;   /* errno with which its rule failed, 0: none; event: its place in the journal,
                         0: there is none */
};
_Static_assert(sizeof(struct uffdaemon_record) == 64, "uffdaemon_record");

/* The snapshot that a FORK event carries, or NULL. */
static inline struct uffdaemon_snapshot *
uffdaemon_record_snapshot(const struct uffdaemon_record *record)
{
    if (record->message.event != UFFD_EVENT_FORK)
        return NULL;
    return (struct uffdaemon_snapshot *)(uintptr_t)record->done;
}

#endif
