/* SPDX-License-Identifier: Apache-2.0 */
/* Memory of this process: mapping, advice, and access without the GIL. */
#ifndef UFFDAEMON_MAPPING_H
#define UFFDAEMON_MAPPING_H

#include <stddef.h>
#include <stdint.h>

#include "uapi.h"

enum uffdaemon_map_kind {
    UFFDAEMON_MAP_SHARED = 1,
    UFFDAEMON_MAP_HUGETLB = 2,
};

int uffdaemon_map(int fd, uint64_t length, unsigned kind, uint64_t alignment, uint64_t *start);
int uffdaemon_unmap(uint64_t start, uint64_t length);
int uffdaemon_protect(uint64_t start, uint64_t length);
int uffdaemon_remap(uint64_t start, uint64_t length, uint64_t target);
int uffdaemon_advise(uint64_t start, uint64_t length, int advice);
int uffdaemon_mincore(uint64_t start, uint64_t length, unsigned char *vector);
void uffdaemon_copy_memory(void *dst, const void *src, size_t length);
void uffdaemon_touch(uint64_t start, uint64_t length, uint64_t step, int write);
long uffdaemon_scan(int pagemap, struct pm_scan_arg *argument);

#endif
