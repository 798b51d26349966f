#define _GNU_SOURCE
#include "handed.h"

#include "shared.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MAX_TEXT 65536UL

static int by_start(const void *left, const void *right)
{
    uint64_t a = ((const struct region *)left)->start;
    uint64_t b = ((const struct region *)right)->start;
    return a < b ? -1 : a > b;
}

/* Reads the regions out of {"regions": [[start, length], ...], "windows": ...}. */
static uint64_t read_regions(struct handed *handed, char *text, const char *windows)
{
    uint64_t total = 0;
    char *cursor = strchr(text, '[');
    handed->regions = allocate(MAX_TEXT / 8, sizeof *handed->regions);
    while (cursor != NULL && (cursor = strchr(cursor + 1, '[')) != NULL && cursor < windows) {
        struct region *region = &handed->regions[handed->count++];
        region->start = strtoull(cursor + 1, &cursor, 10);
        region->length = strtoull(cursor + 1, &cursor, 10);
        total += region->length;
    }
    return total;
}

int receive_regions(struct handed *handed, int sock, const char *image)
{
    char *text = allocate(MAX_TEXT, 1);
    int uffd = receive_descriptor(sock, text, MAX_TEXT);
    char *windows = strstr(text, "\"windows\"");
    if (windows == NULL) {
        errno = EINVAL;
        die(text);
    }
    uint64_t total = read_regions(handed, text, windows);
    int descriptor = open(image, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) {
        die(image);
    }
    char *mapped = mmap(NULL, total, PROT_READ, MAP_SHARED | MAP_NORESERVE, descriptor, 0);
    if (mapped == MAP_FAILED) {
        die("mmap");
    }
    uint64_t source = (uint64_t)(uintptr_t)mapped;
    for (size_t index = 0; index < handed->count; index++) {
        handed->regions[index].source = source;
        source += handed->regions[index].length;
    }
    qsort(handed->regions, handed->count, sizeof *handed->regions, by_start);
    windows = strchr(windows, '[') + 1;
    while ((windows = strchr(windows, '[')) != NULL) {
        uint64_t offset = strtoull(windows + 1, &windows, 10);
        uint64_t length = strtoull(windows + 1, &windows, 10);
        if (madvise(mapped + offset, length, MADV_POPULATE_READ) != 0) {
            die("MADV_POPULATE_READ");
        }
    }
    free(text);
    return uffd;
}

const struct region *find_region(const struct handed *handed, uint64_t address)
{
    size_t low = 0;
    size_t high = handed->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct region *region = &handed->regions[middle];
        if (address < region->start) {
            high = middle;
        } else if (address - region->start >= region->length) {
            low = middle + 1;
        } else {
            return region;
        }
    }
    errno = ENOENT;
    die("a fault outside every region");
}
