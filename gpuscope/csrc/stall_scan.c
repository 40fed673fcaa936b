/*
 * How a `StallWatch` finds stages that make no progress: it reads what was written to the flight recorder's ring since the
 * last time, and keeps a table of what runs. There is no progress where neither a stage nor any inside it has begun or ended.
 *
 * Of stages inside one another the innermost that is late is named, once. Nothing is said of the first calls of a stage, of
 * what runs inside them, or of what is around them. The twin is `WatchInPython.scan` of `_stalls/watch.py`.
 */
#include "stall.h"

enum { SITES_AT = 49152, SITE_BYTES = 128, THREADS_AT = 16384, THREAD_BYTES = 64, NONE = 0xFFFF };
/* Looks are at most half as far apart, unless the process was stopped, or had no processor: then nobody made progress. */
static const long long PAUSE_NS = 500000000;

void copy_text(const char *at, char *to, size_t room) {
    size_t size = at == NULL ? 0 : atomic_load_explicit((_Atomic unsigned *)at, memory_order_acquire);
    if (size > room - 1) size = room - 1;
    if (size) memcpy(to, at + 4, size);
    for (size_t i = 0; i < size; i++)
        if ((unsigned char)to[i] < ' ') to[i] = '?';
    to[size] = 0;
}

const char *site_at(const FlightRing *ring, unsigned site) { return ring->base + SITES_AT + (size_t)site * SITE_BYTES; }

const char *thread_at(const FlightRing *ring, Number ident) {
    for (int i = 0; i < MAX_THREADS; i++) {
        const char *at = ring->base + THREADS_AT + (size_t)i * THREAD_BYTES;
        Number found;
        memcpy(&found, at, sizeof found);
        if (found == ident && ident) return at + 8;
    }
    return NULL;
}

static Open *find_open(StallWatch *self, Number id) {
    for (size_t i = id & (OPEN_BUCKETS - 1); self->buckets[i] != NONE; i = (i + 1) & (OPEN_BUCKETS - 1))
        if (self->open[self->buckets[i]].id == id) return &self->open[self->buckets[i]];
    return NULL;
}

static void add_to_buckets(StallWatch *self, int which) {
    size_t i = self->open[which].id & (OPEN_BUCKETS - 1);
    while (self->buckets[i] != NONE) i = (i + 1) & (OPEN_BUCKETS - 1);
    self->buckets[i] = (unsigned short)which;
}

/* Something has begun or ended inside these. */
static void note_progress(StallWatch *self, Number parent, long long at_ns) {
    for (Open *outer = find_open(self, parent); outer != NULL; outer = find_open(self, outer->parent))
        if (outer->active_ns < at_ns) outer->active_ns = at_ns;
}

/* Returns 0 where there is no room until somebody comes for what was found: it is to be found again in the next look. */
static int push_found(StallWatch *self, const Open *open, Number kind, long long limit_ns, long long now_ns) {
    if (self->found_count == MOST_FOUND) return 0;
    Found *found = &self->found[self->found_count];
    *found = (Found){
        .kind = kind, .high = open->high, .low = open->low, .id = open->id, .thread = open->thread, .site = open->site,
        .start_ns = open->start_ns, .active_ns = open->active_ns, .limit_ns = limit_ns, .now_ns = now_ns,
    };
    if (stall_streams != NULL && open->slot < stall_slots)
        found->watch = (uintptr_t)atomic_load_explicit(&stall_streams[open->slot], memory_order_relaxed);
    copy_text(site_at(self->ring, open->site), found->site_name, SITE_TEXT);
    copy_text(thread_at(self->ring, open->thread), found->thread_name, THREAD_TEXT);
    if (!self->found_count++) self->found_ns = now_ns;
    return 1;
}

/* What has ended since the last time. */
static void look_at_open(StallWatch *self, long long now_ns) {
    for (int i = 0; i < self->count; i++) {
        Open *open = &self->open[i];
        if (open->is_ended) { /* It is still to be said. */
            open->is_gone = (char)push_found(self, open, STALL_ENDS, 0, now_ns);
            continue;
        }
        const Slot *slot = &self->ring->slots[open->slot];
        Number end = atomic_load_explicit(&slot->field[END], memory_order_acquire);
        int is_same = atomic_load(&slot->field[2]) == open->id && atomic_load(&slot->field[4]) == (Number)open->start_ns;
        if (is_same && !end) continue;
        open->is_ended = 1;
        long long ended_ns = is_same ? open->start_ns + (long long)(end >> 2) : self->last_ns;
        note_progress(self, open->parent, ended_ns);
        open->is_gone = open->is_said != 1 || push_found(self, open, STALL_ENDS, 0, now_ns);
    }
}

/* So many first calls are excused: as was said here, by the stage itself, or of all. */
static unsigned warmup_of(const StallWatch *self, unsigned site) {
    int own = self->warmups[site] < 0 ? self->ring->warmups[site] : self->warmups[site];
    return own < 0 ? self->warmup : (unsigned)own;
}

/* Returns 0 where a record is being written: it is read next time. */
static int read_slot(StallWatch *self, size_t at) {
    Slot *slot = &self->ring->slots[at];
    Number field[7], word = atomic_load_explicit(&slot->word, memory_order_acquire);
    if (!word) return 0;
    if ((word & KIND_MASK) != STAGE_KIND) return 1;
    for (int i = 0; i < 7; i++) field[i] = atomic_load_explicit(&slot->field[i], memory_order_relaxed);
    atomic_thread_fence(memory_order_acquire);
    if (atomic_load_explicit(&slot->word, memory_order_relaxed) != word) return 1; /* Written anew: it comes again. */
    if (find_open(self, field[2]) != NULL) return 1; /* It runs since the lap before. */
    unsigned site = (unsigned)(word >> SITE_SHIFT) & (MAX_SITES - 1);
    long long start_ns = (long long)field[4];
    note_progress(self, field[3], field[END] ? start_ns + (long long)(field[END] >> 2) : start_ns);
    unsigned calls = ++self->begun[site];
    if (field[END] || self->count == MOST_OPEN) return 1;
    const Open *outer = find_open(self, field[3]);
    self->open[self->count] = (Open){
        .high = field[0], .low = field[1], .id = field[2], .parent = field[3], .thread = field[6], .site = site, .slot = at,
        .start_ns = start_ns, .active_ns = start_ns, .is_warm = calls <= warmup_of(self, site) || (outer != NULL && outer->is_warm),
    };
    add_to_buckets(self, self->count++);
    return 1;
}

static void read_new(StallWatch *self) {
    Part *part = &self->ring->parts[OF_STAGES];
    /* Another thread writes them: a lap that is too old makes the sum too small, and the rest comes next time. */
    Number lap = __atomic_load_n(&part->lap, __ATOMIC_ACQUIRE);
    Number cursor = __atomic_load_n(&part->cursor, __ATOMIC_ACQUIRE), count = self->ring->count;
    Number written = lap * count + cursor;
    if (written < self->read) return;
    if (written - self->read > count) self->read = written - count;
    while (self->read < written && read_slot(self, (size_t)(self->read % count))) self->read++;
}

static void forget_gone(StallWatch *self) {
    int kept = 0;
    for (int i = 0; i < self->count; i++)
        if (!self->open[i].is_gone) {
            if (kept != i) self->open[kept] = self->open[i];
            kept++;
        }
    self->count = kept;
}

static void fill_buckets(StallWatch *self) {
    memset(self->buckets, 0xFF, sizeof self->buckets);
    for (int i = 0; i < self->count; i++) add_to_buckets(self, i);
}

static long long limit_of(const StallWatch *self, const Open *open) {
    long long own_ns = self->limits[open->site];
    return own_ns ? own_ns : self->limit_ns;
}

/* Whether something around it is said to make no progress. */
static int is_said_around(StallWatch *self, const Open *open) {
    const Open *outer = find_open(self, open->parent);
    for (; outer != NULL; outer = find_open(self, outer->parent))
        if (outer->is_said && !outer->is_ended) return 1;
    return 0;
}

static void judge(StallWatch *self, long long now_ns) {
    for (int i = 0; i < self->count; i++) {
        Open *open = &self->open[i];
        open->is_excused = open->is_warm;
        open->is_late_inside = 0;
    }
    /* What is inside stands behind what is around it. */
    for (int i = self->count; i-- > 0;) {
        Open *open = &self->open[i], *outer = find_open(self, open->parent);
        long long limit_ns = limit_of(self, open);
        open->is_over = !open->is_ended && limit_ns > 0 && now_ns - open->active_ns > limit_ns;
        if (outer == NULL) continue;
        if (outer->active_ns < open->active_ns) outer->active_ns = open->active_ns;
        outer->is_excused |= open->is_excused;
        outer->is_late_inside |= open->is_late_inside || (open->is_over && !open->is_excused);
    }
    for (int i = 0; i < self->count; i++) {
        Open *open = &self->open[i];
        if (open->is_ended) continue;
        if (!open->is_over || open->is_excused) {
            if (open->is_said != 1 || push_found(self, open, STALL_ENDS, 0, now_ns)) open->is_said = 0;
        } else if (!open->is_said && !open->is_late_inside) {
            if (is_said_around(self, open)) {
                open->is_said = 2;
            } else if (push_found(self, open, STALL_BEGINS, limit_of(self, open), now_ns)) {
                open->is_said = 1;
                self->stalls++;
            }
        }
    }
}

void excuse_all(StallWatch *self, long long now_ns) {
    for (int i = 0; i < self->count; i++)
        if (self->open[i].active_ns < now_ns) self->open[i].active_ns = now_ns;
}

void scan_ring(StallWatch *self, long long now_ns) {
    long long since_ns = now_ns - self->last_ns;
    if (self->last_ns && since_ns > PAUSE_NS)
        for (int i = 0; i < self->count; i++) self->open[i].active_ns += since_ns;
    fill_buckets(self);
    look_at_open(self, now_ns);
    read_new(self);
    forget_gone(self);
    fill_buckets(self);
    judge(self, now_ns);
    self->last_ns = now_ns;
}
