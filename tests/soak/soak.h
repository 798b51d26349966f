/* What the threads of the soak test share with Python; tests/soak/threads.py mirrors it. */
#ifndef SOAK_H
#define SOAK_H

#define _GNU_SOURCE
#include <stdint.h>

/* PAGE, the size of a page in bytes, comes from the command line. */
#define WRITERS 4

/* Pages of each slot, by what happens to them. */
#define HOT 0    /* written by all writers, each its own word */
#define COLD 1   /* two pages that hold what many others hold, too: KSM merges them */
#define DIRECT 3 /* read into with O_DIRECT */
#define RING 4   /* pinned now and then as a registered buffer of io_uring */
#define PAGES 5

#define PATTERN 0x6b6d656d6b6d656dULL

struct writer {
    uint64_t count;     /* what the word must hold */
    uint64_t published; /* what everybody must be able to see by now */
    uint64_t lost, stale, reads, padding[3];
};

struct soak {
    uint64_t slots[2]; /* addresses; each page is at one of them at a time */
    uint64_t spacing;  /* bytes from one page of a slot to the next */
    uint32_t stop, padding;
    struct writer writers[WRITERS];
    uint64_t checks, wrong;                       /* contents that must not change */
    uint64_t forks, directs, rings, pageouts; /* disturbances that were carried out */
    uint64_t lingering;                           /* nanoseconds that each child stays */
    int32_t file, unused;                         /* opened with O_DIRECT, DIRECT_BLOCKS pages */
};

#define DIRECT_BLOCKS 16

static inline uint64_t next_random(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005ULL + 1442695040888963407ULL;
    return *seed >> 33;
}

static inline uint64_t *word_of(const struct soak *soak, unsigned slot, unsigned page,
                                unsigned byte)
{
    return (uint64_t *)(uintptr_t)(soak->slots[slot & 1] + page * soak->spacing + byte);
}

static inline int stopped(const struct soak *soak)
{
    return __atomic_load_n(&soak->stop, __ATOMIC_ACQUIRE);
}
#endif
