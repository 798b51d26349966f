/*
 * The client: maps memory, registers it with a userfaultfd, hands the descriptor and a line of
 * JSON ({"regions": [[start, length], ...], "windows": [[offset, length], ...]}) over --socket,
 * waits for "go PID", touches pages with a clock round each touch, and writes what it saw as JSON.
 *
 * Without --socket nothing is registered: the kernel's own anonymous fault.
 *
 * Regions lie in the image one after the other; windows are the parts of the image whose pages
 * are touched, each page once. Page k of the image must begin with the 64-bit number k + 1, and
 * each page that does not is counted as wrong.
 */
#define _GNU_SOURCE
#include "client.h"
#include "shared.h"

#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
        worker->wrong += worker->options->sock >= 0 && value != touch->expected;
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

static uint64_t used_by(const struct options *options, clockid_t clock)
{
    struct timespec used = {0};
    if (options->sock >= 0 && clock_gettime(clock, &used) != 0) {
        die("clock_gettime");
    }
    return (uint64_t)used.tv_sec * 1000000000ULL + (uint64_t)used.tv_nsec;
}

/* Touches [warm, count), shared out among the threads; returns nanoseconds of wall time. */
static uint64_t run(const struct options *options, struct touch *touches, size_t count,
                    uint64_t *wrong)
{
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
        *wrong += workers[0].wrong;
        return nanoseconds() - before;
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
    return nanoseconds() - before;
}

static void report(const struct touch *touches, size_t count, uint64_t wall, uint64_t handler,
                   uint64_t wrong)
{
    uint64_t *latencies = allocate(count, sizeof *latencies);
    uint64_t total = 0;
    for (size_t index = 0; index < count; index++) {
        latencies[index] = touches[index].latency;
        total += latencies[index];
    }
    sort_values(latencies, count);
    printf("{\"pages\": %zu, \"wrong\": %lu, \"mean_us\": %.3f, \"p50_us\": %.3f, "
           "\"p90_us\": %.3f, \"p99_us\": %.3f, \"wall_us_per_page\": %.3f, "
           "\"handler_cpu_us_per_page\": %.3f}\n",
           count, wrong, (double)total / (double)count / 1e3,
           (double)percentile(latencies, count, 50) / 1e3,
           (double)percentile(latencies, count, 90) / 1e3,
           (double)percentile(latencies, count, 99) / 1e3, (double)wall / (double)count / 1e3,
           (double)handler / (double)count / 1e3);
    free(latencies);
}

static struct options parse(int argc, char **argv)
{
    static const struct option names[] = {
        {"socket", 1, NULL, 's'},  {"pages", 1, NULL, 'p'},   {"warm", 1, NULL, 'w'},
        {"regions", 1, NULL, 'r'}, {"length", 1, NULL, 'l'},  {"windows", 1, NULL, 'n'},
        {"threads", 1, NULL, 't'}, {"gap-us", 1, NULL, 'g'},  {"busy-gap", 0, NULL, 'b'},
        {"sequential", 0, NULL, 'q'}, {"cpu", 1, NULL, 'c'},  {0},
    };
    struct options options = {
        .sock = -1, .pages = 2048, .warm = 256, .regions = 1, .windows = 1, .threads = 1};
    for (int option; (option = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (option) {
        case 's': options.sock = (int)number(optarg, 1 << 20); break;
        case 'p': options.pages = number(optarg, 1UL << 24); break;
        case 'w': options.warm = number(optarg, 1UL << 24); break;
        case 'r': options.regions = number(optarg, 2000); break;
        case 'l': options.length = number(optarg, 1UL << 46); break;
        case 'n': options.windows = number(optarg, 1000); break;
        case 't': options.threads = number(optarg, 1000); break;
        case 'g': options.gap = number(optarg, 999999) * 1000; break;
        case 'b': options.gap_kind = GAP_BUSY; break;
        case 'q': options.sequential = 1; break;
        case 'c': options.core_count = parse_cores(optarg, options.cores, MAX_CORES); break;
        default: exit(2);
        }
    }
    if (options.length == 0) {
        options.length = options.pages / options.regions * BENCH_PAGE;
    }
    if (options.warm >= options.pages || options.length == 0) {
        errno = EINVAL;
        die("--warm, --pages");
    }
    return options;
}

int main(int argc, char **argv)
{
    const struct options options = parse(argc, argv);
    pin(options.core_count ? options.cores[0] : -1);
    struct touch *touches = allocate(options.pages, sizeof *touches);
    char **bases = allocate(options.regions, sizeof *bases);
    char *text = allocate(MAX_TEXT, 1);
    size_t count = prepare(&options, touches, bases, text);
    clockid_t clock = CLOCK_PROCESS_CPUTIME_ID;
    if (options.sock >= 0) {
        clock = hand_over(&options, bases, text);
    }
    uint64_t wrong = 0;
    struct options warming = options;
    warming.warm = 0;
    warming.gap = 0;
    warming.threads = 1;
    run(&warming, touches, options.warm, &wrong);
    uint64_t before = used_by(&options, clock);
    uint64_t wall = run(&options, touches, count, &wrong);
    uint64_t handler = used_by(&options, clock) - before;
    report(touches + options.warm, count - options.warm, wall, handler, wrong);
    return 0;
}
