/*
 * The client's memory: mapped, warmed, registered and handed to the handler.
 */
#ifndef BENCH_CLIENT_H
#define BENCH_CLIENT_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define MAX_CORES 64
#define MAX_TEXT 65536UL

enum gap_kind { GAP_SLEEP, GAP_BUSY };

struct touch {
    volatile uint64_t *address;
    uint64_t expected;
    uint64_t latency; /* nanoseconds */
};

struct options {
    int sock; /* -1: the kernel's own fault */
    uint64_t pages;
    uint64_t warm; /* how many of them are touched before the clock starts */
    uint64_t regions;
    uint64_t length; /* bytes of one region; 0: as many as are touched */
    uint64_t windows;
    uint64_t threads;
    uint64_t gap; /* nanoseconds between touches */
    enum gap_kind gap_kind;
    int sequential;
    int cores[MAX_CORES];
    size_t core_count;
};

/* Maps the regions, has the host find their memory, and lists the touches in the order in which
 * they are made. `touches` has room for options->pages, `bases` for options->regions, `text` for
 * MAX_TEXT bytes of JSON. Returns the number of touches. */
size_t prepare(const struct options *options, struct touch *touches, char **bases, char *text);

/* Registers the regions and hands them over; returns the handler's processor clock once it says
 * "go". The descriptor stays open until this process ends. */
clockid_t hand_over(const struct options *options, char **bases, const char *text);

#endif
