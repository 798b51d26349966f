/*
 * A heap of objects that C threads, the mutators, use while its pages move.
 *
 * No pointer to an object is kept.  A mutator has handles: the handle of an object is its number,
 * and a table has the address of each page of objects.  There are two such tables, the generations:
 * moving the heap means filling the second one and switching to it.
 *
 * compaction.py calls all of this through ctypes, which releases the GIL.
 */
#ifndef HEAP_H
#define HEAP_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#define PAGE 4096u
#define MUTATORS 4u /* at most */
#define OBJECTS_PER_PAGE (PAGE / sizeof(struct object))
#define FINE 16u /* buckets of the histogram per power of two: 6 % apart */
#define BUCKETS (48u * FINE) /* figures.py has the same number */

struct object {
    uint64_t number;         /* never changes: another number here means the wrong memory */
    _Atomic uint64_t total;  /* all mutators add to it */
    uint64_t own[MUTATORS];  /* each mutator chains its amounts, so that the order counts */
    uint64_t padding[10];
};
_Static_assert(sizeof(struct object) == 128, "objects fill pages evenly");

/* What a mutator has written to one object, kept outside the heap. */
struct expected {
    uint64_t total;
    uint64_t own;
};

struct heap;

struct mutator {
    struct heap *heap;
    pthread_t thread;
    unsigned number;
    _Atomic unsigned generation; /* in use by this mutator; published before each operation */
    uint64_t random;
    uint64_t operations;
    uint64_t strangers; /* objects with the wrong number */
    uint64_t worst;     /* nanoseconds */
    uint64_t *histogram;
    struct expected *expected;
};

struct heap {
    const uint64_t *addresses[2]; /* of each page of objects, by generation */
    uint64_t objects;
    uint64_t interval; /* nanoseconds between operations of a mutator */
    unsigned mutators;
    _Atomic unsigned generation;
    _Atomic int recording;
    _Atomic int stopping;
    _Atomic int pausing;
    _Atomic unsigned paused;
    struct mutator mutator[MUTATORS];
};

/* Creates the objects of `pages` pages at these addresses; the array must live as long as the heap.
 * NULL: no memory. */
struct heap *heap_new(const uint64_t *addresses, uint64_t pages, unsigned mutators,
                      uint64_t interval);
int heap_start(struct heap *heap); /* 0, or an errno */
/* Switches to the second generation.  No mutator is stopped; some still use the first. */
void heap_flip(struct heap *heap, const uint64_t *addresses);
/* Waits until every mutator has begun an operation with the newest generation.  From then on none
 * uses an address of the previous one. */
void heap_wait_passed(struct heap *heap);
/* Stops the world: returns once every mutator is parked between two operations. */
void heap_pause(struct heap *heap);
void heap_resume(struct heap *heap);
/* Latencies count while `on`; an operation that is running when it is switched off counts too. */
void heap_record(struct heap *heap, int on);
void heap_stop(struct heap *heap); /* returns once all mutators have ended */
/* How many objects do not contain what the mutators wrote.  Only after heap_stop. */
uint64_t heap_wrong(const struct heap *heap);
/* Adds all mutators' histograms into BUCKETS numbers; returns the worst latency, nanoseconds. */
uint64_t heap_latencies(const struct heap *heap, uint64_t *histogram);
uint64_t heap_operations(const struct heap *heap);
void heap_free(struct heap *heap);

#endif
