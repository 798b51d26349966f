/*
 * What the client hands over: its userfaultfd, its regions, and which parts it will touch.
 */
#ifndef BENCH_HANDED_H
#define BENCH_HANDED_H

#include <stddef.h>
#include <stdint.h>

struct region {
    uint64_t start;
    uint64_t length;
    uint64_t source; /* address of its first byte in the mapped image */
};

struct handed {
    struct region *regions; /* sorted by start */
    size_t count;
};

/* Receives all over `sock`, maps the file `image` and brings in the parts that the client will
 * touch. Returns the userfaultfd, the caller's from now on; what is mapped stays mapped. */
int receive_regions(struct handed *handed, int sock, const char *image);

/* The region that holds `address`; exits when there is none. */
const struct region *find_region(const struct handed *handed, uint64_t address);

#endif
