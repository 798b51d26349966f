/* SPDX-License-Identifier: Apache-2.0 */
/* Memory of this process: mapping it, advising about it, and touching it without the GIL. */
#define _GNU_SOURCE
#include "mapping.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "base.h"

/* Maps `length` bytes at an address that is a multiple of `alignment` (bytes, a power of two).
 * fd -1 is anonymous memory.  The caller owns the range until it unmaps it. */
int uffdaemon_map(int fd, uint64_t length, unsigned kind, uint64_t alignment, uint64_t *start)
{
    int flags = kind & UFFDAEMON_MAP_SHARED ? MAP_SHARED : MAP_PRIVATE;
    uint64_t slack = alignment > uffdaemon_page_size() ? alignment : 0;
    char *reserved, *aligned, *mapped;

    if (length == 0)
        return -EINVAL;
    /* Reserve enough room to align in, map over it, and unmap the ends. */
    reserved = mmap(NULL, length + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                    -1, 0);
    if (reserved == MAP_FAILED)
        return -errno;
    aligned = (char *)(((uintptr_t)reserved + alignment - 1) & ~(uintptr_t)(alignment - 1));

    if (fd < 0)
        flags |= MAP_ANONYMOUS;
    /* Guarded memory may be much larger than what is ever filled; hugetlb pages are reserved. */
    if (!(kind & UFFDAEMON_MAP_HUGETLB))
        flags |= MAP_NORESERVE;
    mapped = mmap(aligned, length, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
    if (mapped == MAP_FAILED) {
        int error = errno;
        munmap(reserved, length + slack);
        return -error;
    }
    if (aligned > reserved)
        munmap(reserved, (size_t)(aligned - reserved));
    if (reserved + slack > aligned)
        munmap(aligned + length, (size_t)(reserved + slack - aligned));
    *start = (uint64_t)(uintptr_t)mapped;
    return 0;
}

int uffdaemon_unmap(uint64_t start, uint64_t length)
{
    return munmap((void *)(uintptr_t)start, length) ? -errno : 0;
}

/* Removes all access: touching the range raises SIGSEGV.  No event is sent. */
int uffdaemon_protect(uint64_t start, uint64_t length)
{
    return mprotect((void *)(uintptr_t)start, length, PROT_NONE) ? -errno : 0;
}

/* mremap(2) to `target`, which must be reserved by the caller. */
int uffdaemon_remap(uint64_t start, uint64_t length, uint64_t target)
{
    void *moved = mremap((void *)(uintptr_t)start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED,
                         (void *)(uintptr_t)target);
    return moved == MAP_FAILED ? -errno : 0;
}

int uffdaemon_advise(uint64_t start, uint64_t length, int advice)
{
    return madvise((void *)(uintptr_t)start, length, advice) ? -errno : 0;
}

/* Sets vector[n] to 1 for each page that is in memory, mapped or not. */
int uffdaemon_mincore(uint64_t start, uint64_t length, unsigned char *vector)
{
    return mincore((void *)(uintptr_t)start, length, vector) ? -errno : 0;
}

void uffdaemon_copy_memory(void *dst, const void *src, size_t length)
{
    memcpy(dst, src, length);
}

/* Touches one byte in every `step` bytes; writing adds 0 atomically, so that no content changes. */
void uffdaemon_touch(uint64_t start, uint64_t length, uint64_t step, int write)
{
    unsigned char zero = 0;

    __asm__ volatile("" : "+r"(zero)); /* clang turns adding a known 0 into a load */
    for (uint64_t offset = 0; offset < length; offset += step) {
        volatile unsigned char *byte = (volatile unsigned char *)(uintptr_t)(start + offset);
        if (write)
            __atomic_fetch_add(byte, zero, __ATOMIC_RELAXED);
        else
            (void)*byte;
    }
}

/* PAGEMAP_SCAN on an open /proc/PID/pagemap.  Returns the number of regions written, or -errno. */
long uffdaemon_scan(int pagemap, struct pm_scan_arg *argument)
{
    int count = ioctl(pagemap, PAGEMAP_SCAN, argument);
    return count < 0 ? -errno : count;
}
