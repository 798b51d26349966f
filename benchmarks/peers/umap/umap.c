/*
 * LLNL umap: a file in memory, mapped by umap(), whose own threads answer the faults by reading.
 * One process; it takes the toucher's options, touches the same pages of --image in the same
 * order, and writes the same JSON. umap's environment variables apply, such as UMAP_PAGESIZE.
 */
#define _GNU_SOURCE
#include "../../native/shared.h"
#include "../../native/touching.h"

#include <umap/umap.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    const struct options options = parse_options(argc, argv);
    if (options.image == NULL || options.regions != 1) {
        errno = EINVAL;
        die("--image, --regions");
    }
    int descriptor = open(options.image, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) {
        die(options.image);
    }
    /* Its threads are made here, on the cores that this thread may run on. */
    pin(options.handler_core);
    char *base = umap(NULL, options.length, PROT_READ, UMAP_PRIVATE, descriptor, 0);
    if (base == UMAP_FAILED) {
        die("umap");
    }
    pin(options.core_count ? options.cores[0] : -1);
    char text[1024];
    touch_and_report(&options, &base, text, sizeof text);
    fputs(text, stdout);
    fflush(stdout);
    return uunmap(base, options.length) == 0 ? 0 : 1;
}
