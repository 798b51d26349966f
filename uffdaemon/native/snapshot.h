/* SPDX-License-Identifier: Apache-2.0 */
/* The page states at the time a FORK event was read. */
#ifndef UFFDAEMON_SNAPSHOT_H
#define UFFDAEMON_SNAPSHOT_H

#include "pages.h"
#include "table.h"

struct uffdaemon_snapshot;

struct uffdaemon_snapshot *uffdaemon_snapshot_new(const struct uffdaemon_table *table);
struct uffdaemon_pages *uffdaemon_snapshot_take(struct uffdaemon_snapshot *snapshot,
                                                struct uffdaemon_pages *original);
int uffdaemon_snapshot_write(const struct uffdaemon_snapshot *snapshot);
void uffdaemon_snapshot_free(struct uffdaemon_snapshot *snapshot);

#endif
