/* The heap: see heap.h. */
#define _GNU_SOURCE
#include "heap.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct object *resolve(const struct heap *heap, unsigned generation, uint64_t number)
{
    uint64_t page = heap->addresses[generation][number / OBJECTS_PER_PAGE];
    return (struct object *)(uintptr_t)page + number % OBJECTS_PER_PAGE;
}

/* -- making the heap --------------------------------------------------------------------------- */

struct heap *heap_new(const uint64_t *addresses, uint64_t pages, unsigned mutators,
                      uint64_t interval)
{
    struct heap *heap = calloc(1, sizeof *heap);

    if (heap == NULL || mutators < 1 || mutators > MUTATORS) {
        free(heap);
        return NULL;
    }
    heap->addresses[0] = addresses;
    heap->objects = pages * OBJECTS_PER_PAGE;
    heap->interval = interval;
    heap->mutators = mutators;
    for (unsigned number = 0; number < mutators; number++) {
        struct mutator *mutator = &heap->mutator[number];
        *mutator = (struct mutator){.heap = heap, .number = number, .random = number + 1};
        mutator->histogram = calloc(BUCKETS, sizeof *mutator->histogram);
        mutator->expected = malloc(heap->objects * sizeof *mutator->expected);
        if (mutator->histogram == NULL || mutator->expected == NULL) {
            heap_free(heap);
            return NULL;
        }
        /* Written now, so that no page of it is missing when the measurement starts. */
        for (uint64_t object = 0; object < heap->objects; object++)
            mutator->expected[object] = (struct expected){0, object};
    }
    for (uint64_t number = 0; number < heap->objects; number++) {
        struct object *object = resolve(heap, 0, number);
        object->number = number;
        atomic_store(&object->total, 0);
        for (unsigned owner = 0; owner < MUTATORS; owner++)
            object->own[owner] = number;
    }
    return heap;
}

void heap_free(struct heap *heap)
{
    for (unsigned number = 0; number < heap->mutators; number++) {
        free(heap->mutator[number].histogram);
        free(heap->mutator[number].expected);
    }
    free(heap);
}

/* -- mutators --------------------------------------------------------------------------------- */

static uint64_t draw(struct mutator *self)
{
    /* xorshift64: the same objects in every run, in an order that no prefetcher predicts. */
    self->random ^= self->random << 13;
    self->random ^= self->random >> 7;
    self->random ^= self->random << 17;
    return self->random;
}

/* Reads, modifies and writes one object.  Any access may fault and wait. */
static void operate(struct mutator *self, unsigned generation)
{
    const struct heap *heap = self->heap;
    uint64_t drawn = draw(self), number = drawn % heap->objects, amount = drawn >> 32;
    struct object *object = resolve(heap, generation, number);
    struct expected *expected = &self->expected[number];

    self->strangers += object->number != number;
    atomic_fetch_add_explicit(&object->total, amount, memory_order_relaxed);
    object->own[self->number] = object->own[self->number] * 31 + amount;

    expected->total += amount;
    expected->own = expected->own * 31 + amount;
    self->operations++;
}

static void record(struct mutator *self, uint64_t latency)
{
    uint64_t bucket = latency;

    if (latency >= FINE) {
        unsigned doubled = 59u - (unsigned)__builtin_clzll(latency); /* the top 5 bits are kept */
        bucket = doubled * FINE + (latency >> doubled);
    }
    self->histogram[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    if (latency > self->worst)
        self->worst = latency;
}

static void stand_still(struct heap *heap)
{
    atomic_fetch_add(&heap->paused, 1);
    while (atomic_load(&heap->pausing))
        sched_yield();
    atomic_fetch_sub(&heap->paused, 1);
}

static void *mutate(void *argument)
{
    struct mutator *self = argument;
    struct heap *heap = self->heap;
    uint64_t due = nanoseconds(), measured_from = UINT64_MAX;

    while (!atomic_load_explicit(&heap->stopping, memory_order_relaxed)) {
        unsigned generation;

        if (atomic_load(&heap->pausing))
            stand_still(heap);
        /* No pointer of the previous operation is left: here a mutator switches to a new
         * generation, and publishes that it has.  It never waits for this. */
        generation = atomic_load(&heap->generation);
        atomic_store(&self->generation, generation);
        if (nanoseconds() < due) {
            sched_yield();
            continue;
        }
        operate(self, generation);
        /* Measured from the scheduled time: after a pause, every operation that piled up counts as
         * late, so that a pause is not hidden by the one operation that met it. */
        if (due >= measured_from)
            record(self, nanoseconds() - due);
        due += heap->interval;
        if (!atomic_load_explicit(&heap->recording, memory_order_relaxed))
            measured_from = UINT64_MAX;
        else if (measured_from == UINT64_MAX)
            measured_from = due;
    }
    return NULL;
}

int heap_start(struct heap *heap)
{
    for (unsigned number = 0; number < heap->mutators; number++) {
        struct mutator *mutator = &heap->mutator[number];
        int error = pthread_create(&mutator->thread, NULL, mutate, mutator);
        if (error) {
            heap->mutators = number; /* only these can be stopped */
            heap_stop(heap);
            return error;
        }
    }
    return 0;
}

void heap_stop(struct heap *heap)
{
    atomic_store(&heap->stopping, 1);
    for (unsigned number = 0; number < heap->mutators; number++)
        pthread_join(heap->mutator[number].thread, NULL);
}

/* -- called by the compactor ------------------------------------------------------------------- */

void heap_flip(struct heap *heap, const uint64_t *addresses)
{
    heap->addresses[1] = addresses;
    atomic_store(&heap->generation, 1);
}

void heap_wait_passed(struct heap *heap)
{
    unsigned newest = atomic_load(&heap->generation);

    for (unsigned number = 0; number < heap->mutators; number++)
        while (atomic_load(&heap->mutator[number].generation) != newest)
            sched_yield();
}

void heap_pause(struct heap *heap)
{
    atomic_store(&heap->pausing, 1);
    while (atomic_load(&heap->paused) < heap->mutators)
        sched_yield();
}

void heap_resume(struct heap *heap)
{
    atomic_store(&heap->pausing, 0);
    while (atomic_load(&heap->paused))
        sched_yield();
}

/* -- results ----------------------------------------------------------------------------------- */

void heap_record(struct heap *heap, int on)
{
    atomic_store(&heap->recording, on);
}

uint64_t heap_wrong(const struct heap *heap)
{
    uint64_t wrong = 0;

    for (unsigned number = 0; number < heap->mutators; number++)
        wrong += heap->mutator[number].strangers;
    for (uint64_t number = 0; number < heap->objects; number++) {
        const struct object *object = resolve(heap, atomic_load(&heap->generation), number);
        uint64_t total = 0;
        int good = object->number == number;

        for (unsigned owner = 0; owner < heap->mutators; owner++) {
            const struct expected *expected = &heap->mutator[owner].expected[number];
            total += expected->total;
            good = good && object->own[owner] == expected->own;
        }
        wrong += !good || atomic_load(&object->total) != total;
    }
    return wrong;
}

uint64_t heap_latencies(const struct heap *heap, uint64_t *histogram)
{
    uint64_t worst = 0;

    memset(histogram, 0, BUCKETS * sizeof *histogram);
    for (unsigned number = 0; number < heap->mutators; number++) {
        const struct mutator *mutator = &heap->mutator[number];
        for (unsigned bucket = 0; bucket < BUCKETS; bucket++)
            histogram[bucket] += mutator->histogram[bucket];
        worst = worst > mutator->worst ? worst : mutator->worst;
    }
    return worst;
}

uint64_t heap_operations(const struct heap *heap)
{
    uint64_t operations = 0;

    for (unsigned number = 0; number < heap->mutators; number++)
        operations += heap->mutator[number].operations;
    return operations;
}
