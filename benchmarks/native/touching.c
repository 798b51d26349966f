#define _GNU_SOURCE
#include "touching.h"

#include "shared.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

static void shuffle(struct touch *touches, size_t count)
{
    uint64_t state = 0x9E3779B97F4A7C15ULL;
    for (size_t index = count; index > 1; index--) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        size_t other = state % index;
        struct touch kept = touches[index - 1];
        touches[index - 1] = touches[other];
        touches[other] = kept;
    }
}

uint64_t pages_per_window(const struct options *options)
{
    return options->pages / (options->regions * options->windows);
}

uint64_t window_spacing(const struct options *options)
{
    return options->length / options->windows / BENCH_PAGE * BENCH_PAGE;
}

size_t list_touches(const struct options *options, char *const *bases, struct touch *touches)
{
    size_t count = 0;
    for (uint64_t region = 0; region < options->regions; region++) {
        for (uint64_t window = 0; window < options->windows; window++) {
            uint64_t offset = window * window_spacing(options);
            uint64_t first = (region * options->length + offset) / BENCH_PAGE + 1;
            for (uint64_t page = 0; page < pages_per_window(options); page++) {
                char *address = bases[region] + offset + page * BENCH_PAGE;
                touches[count].address = (uint64_t *)(void *)address;
                touches[count++].expected = first + page;
            }
        }
    }
    if (!options->sequential) {
        shuffle(touches, count);
    }
    return count;
}

struct worker {
    pthread_t thread;
    const struct options *options;
    struct touch *touches;
    size_t first;
    size_t count;
    size_t step;
    int core;
    uint64_t wrong;
};

static atomic_size_t waiting;
static atomic_int started;

static void wait_gap(const struct options *options)
{
    if (options->gap == 0) {
        return;
    }
    if (options->gap_kind == GAP_SLEEP) {
        struct timespec gap = {.tv_sec = 0, .tv_nsec = (long)options->gap};
        clock_nanosleep(CLOCK_MONOTONIC, 0, &gap, NULL);
        return;
    }
    for (uint64_t until = nanoseconds() + options->gap; nanoseconds() < until;) {
    }
}

static void touch_all(struct worker *worker)
{
    for (size_t index = worker->first; index < worker->count; index += worker->step) {
        struct touch *touch = &worker->touches[index];
        wait_gap(worker->options);
        uint64_t before = nanoseconds();
        uint64_t value = *touch->address;
        touch->latency = nanoseconds() - before;
        worker->wrong += worker->options->checked && value != touch->expected;
    }
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    pin(worker->core);
    atomic_fetch_add(&waiting, 1);
    while (!atomic_load(&started)) {
        sched_yield();
    }
    touch_all(worker);
    return NULL;
}

uint64_t touch_warm(const struct options *options, struct touch *touches)
{
    struct options calm = *options;
    calm.gap = 0;
    struct worker worker = {
        .options = &calm, .touches = touches, .count = options->warm, .step = 1};
    touch_all(&worker);
    return worker.wrong;
}

uint64_t touch_timed(const struct options *options, struct touch *touches, size_t count,
                     uint64_t *wrong)
{
    atomic_store(&waiting, 0);
    atomic_store(&started, 0);
    struct worker *workers = allocate(options->threads, sizeof *workers);
    for (uint64_t index = 0; index < options->threads; index++) {
        workers[index] = (struct worker){
            .options = options,
            .touches = touches,
            .first = options->warm + index,
            .count = count,
            .step = options->threads,
            .core = options->core_count ? options->cores[index % options->core_count] : -1,
        };
    }
    if (options->threads == 1) {
        uint64_t before = nanoseconds();
        touch_all(&workers[0]);
        uint64_t taken = nanoseconds() - before;
        *wrong += workers[0].wrong;
        free(workers);
        return taken;
    }
    for (uint64_t index = 0; index < options->threads; index++) {
        if (pthread_create(&workers[index].thread, NULL, work, &workers[index]) != 0) {
            die("pthread_create");
        }
    }
    while (atomic_load(&waiting) < options->threads) {
        sched_yield();
    }
    uint64_t before = nanoseconds();
    atomic_store(&started, 1);
    for (uint64_t index = 0; index < options->threads; index++) {
        pthread_join(workers[index].thread, NULL);
        *wrong += workers[index].wrong;
    }
    uint64_t taken = nanoseconds() - before;
    free(workers);
    return taken;
}

size_t report(const struct options *options, const struct touch *touches, size_t count,
              uint64_t wall, uint64_t handler, uint64_t wrong, char *text, size_t capacity)
{
    size_t timed = count - options->warm;
    uint64_t *latencies = allocate(timed, sizeof *latencies);
    uint64_t total = 0;
    for (size_t index = 0; index < timed; index++) {
        latencies[index] = touches[options->warm + index].latency;
        total += latencies[index];
    }
    sort_values(latencies, timed);
    int length = snprintf(
        text, capacity,
        "{\"pages\": %zu, \"wrong\": %lu, \"mean_us\": %.3f, \"p50_us\": %.3f, "
        "\"p90_us\": %.3f, \"p99_us\": %.3f, \"wall_us_per_page\": %.3f, "
        "\"handler_cpu_us_per_page\": %.3f}\n",
        timed, wrong, (double)total / (double)timed / 1e3,
        (double)percentile(latencies, timed, 50) / 1e3,
        (double)percentile(latencies, timed, 90) / 1e3,
        (double)percentile(latencies, timed, 99) / 1e3, (double)wall / (double)timed / 1e3,
        (double)handler / (double)timed / 1e3);
    free(latencies);
    return (size_t)length;
}

size_t touch_and_report(const struct options *options, char *const *bases, char *text,
                        size_t capacity)
{
    struct touch *touches = allocate(options->pages, sizeof *touches);
    size_t count = list_touches(options, bases, touches);
    uint64_t wrong = touch_warm(options, touches);
    uint64_t wall = touch_timed(options, touches, count, &wrong);
    size_t length = report(options, touches, count, wall, 0, wrong, text, capacity);
    free(touches);
    return length;
}
