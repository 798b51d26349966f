/*
 * A heap of objects that C threads, the mutators, work on while its pages move.
 *
 * Nobody holds the address of an object.  A mutator has handles: an object's handle is its number,
 * and a table says at which address each page of objects lies.  There are two such tables, the
 * generations: to move the heap is to fill the second one, and to switch over to it.
 *
 * compaction.py calls all of this through ctypes.  Functions that wait do so without the GIL.
 */
#ifndef HEAP_H
#define HEAP_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#define PAGE 4096u
#define MUTATORS 4u /* at most */
#define OBJECTS_PER_PAGE (PAGE / sizeof(struct object))
#define FINE 16u /* buckets of the histogram for each power of two: 6 % apart */
#define BUCKETS (48u * FINE) /* the same number is in compaction.py */

struct object {
    uint64_t number;         /* never changes: whoever finds another one reads the wrong memory */
    _Atomic uint64_t total;  /* all mutators add to it */
    uint64_t own[MUTATORS];  /* each mutator chains what it added; the order counts */
    uint64_t padding[10];
};
_Static_assert(sizeof(struct object) == 128, "objects fill pages evenly");

/* What a mutator knows by itself of one object, never having read it there. */
struct expected {
    uint64_t total;
    uint64_t own;
};

struct heap;

struct mutator {
    struct heap *heap;
    pthread_t thread;
    unsigned number;
    _Atomic unsigned generation; /* the one it works with: published before each operation */
    uint64_t random;
    uint64_t operations;
    uint64_t strangers; /* objects that had another one's number */
    uint64_t worst;     /* nanoseconds */
    uint64_t *histogram;
    struct expected *expected;
};

struct heap {
    const uint64_t *addresses[2]; /* of each page of objects, by generation */
    uint64_t objects;
    uint64_t interval; /* nanoseconds from one operation of a mutator to the next */
    unsigned mutators;
    _Atomic unsigned generation;
    _Atomic int recording;
    _Atomic int stopping;
    _Atomic int pausing;
    _Atomic unsigned paused;
    struct mutator mutator[MUTATORS];
};

/* Makes the objects of `pages` pages at these addresses; the array must live as long as the heap.
 * NULL: no memory. */
struct heap *heap_new(const uint64_t *addresses, uint64_t pages, unsigned mutators,
                      uint64_t interval);
int heap_start(struct heap *heap); /* 0, or an errno */
/* Switches over to the second generation.  Nobody is stopped; some go on with the first. */
void heap_flip(struct heap *heap, const uint64_t *addresses);
/* Waits until every mutator has begun an operation with the newest generation: from then on nobody
 * uses an address of the one before. */
void heap_wait_passed(struct heap *heap);
/* Stops the world: returns once every mutator stands still between two operations. */
void heap_pause(struct heap *heap);
void heap_resume(struct heap *heap);
/* Latencies count while `on`; switched off, an operation that is under way still does. */
void heap_record(struct heap *heap, int on);
void heap_stop(struct heap *heap); /* returns once all mutators have ended */
/* How many objects are not what the mutators made of them.  Only after heap_stop. */
uint64_t heap_wrong(const struct heap *heap);
/* Adds all mutators' histograms into BUCKETS numbers; returns the worst latency, nanoseconds. */
uint64_t heap_latencies(const struct heap *heap, uint64_t *histogram);
uint64_t heap_operations(const struct heap *heap);
void heap_free(struct heap *heap);

#endif
