#define _GNU_SOURCE
#include "shared.h"
#include "touching.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>

struct options parse_options(int argc, char **argv)
{
    static const struct option names[] = {
        {"socket", 1, NULL, 's'},  {"pages", 1, NULL, 'p'},   {"warm", 1, NULL, 'w'},
        {"regions", 1, NULL, 'r'}, {"length", 1, NULL, 'l'},  {"windows", 1, NULL, 'n'},
        {"threads", 1, NULL, 't'}, {"gap-us", 1, NULL, 'g'},  {"busy-gap", 0, NULL, 'b'},
        {"sequential", 0, NULL, 'q'}, {"cpu", 1, NULL, 'c'},  {"image", 1, NULL, 'i'},
        {"handler-cpu", 1, NULL, 'h'}, {0},
    };
    struct options options = {
        .sock = -1, .handler_core = -1, .pages = 2048, .warm = 256, .regions = 1, .windows = 1,
        .threads = 1};
    optind = 0; /* a library parses more than once */
    for (int option; (option = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (option) {
        case 's': options.sock = (int)number(optarg, 1 << 20); break;
        case 'i': options.image = optarg; break;
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
        case 'h': options.handler_core = (int)number(optarg, 1 << 20); break;
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
    options.checked = options.sock >= 0 || options.image != NULL;
    return options;
}
