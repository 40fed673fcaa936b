/*
 * The file that a `StallWatch` writes when no thread of Python runs: what makes no progress, what the streams answered last,
 * and all that runs. Nothing of Python is touched. `_stalls/report.py` adds the stacks as soon as it can.
 */
#include "stall.h"

#ifdef __linux__
#include "sampler.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { ROOM = 1 << 16 };
static const off_t MOST_BYTES = 1 << 20;
static const long long OLD_NS = 1000000000;

typedef struct {
    char text[ROOM];
    size_t size;
} Text;

__attribute__((format(printf, 2, 3))) static void add(Text *to, const char *format, ...) {
    va_list values;
    va_start(values, format);
    int size = vsnprintf(to->text + to->size, ROOM - to->size, format, values);
    va_end(values);
    if (size > 0) to->size = to->size + (size_t)size < ROOM ? to->size + (size_t)size : ROOM - 1;
}

static double seconds(long long ns) { return (double)ns / 1e9; }

static void add_stream(Text *to, const StreamState *state, long long now_ns) {
    add(to, "GPU %lld, stream 0x%llx: ", state->device, state->stream);
    if (!state->asked_ns) add(to, "never asked\n");
    else if (now_ns - state->asked_ns > OLD_NS)
        add(to, "%s for %.1f s, before that %s\n", state->open ? "no answer" : "not asked", seconds(now_ns - state->asked_ns),
            state->work_since_ns ? "work" : "no work");
    else if (state->work_since_ns) add(to, "at every question work, for %.1f s\n", seconds(now_ns - state->work_since_ns));
    else add(to, "no work for %.1f s\n", seconds(now_ns - state->free_since_ns));
}

static StreamState states[MOST_STATES];
static int state_count;

void read_streams(void) { state_count = copy_streams(states, MOST_STATES); }

static const StreamState *state_of(Number watch) {
    for (int i = 0; watch && i < state_count; i++)
        if (states[i].watch == watch) return &states[i];
    return NULL;
}

/* The twin is `kind_of` in `_stalls/found.py`. */
int kind_of_stall(const Found *found, long long now_ns) {
    const StreamState *state = state_of(found->watch);
    int is_known = state != NULL && state->asked_ns && now_ns - state->asked_ns <= OLD_NS;
    int is_free = is_known && state->free_since_ns && now_ns - state->free_since_ns >= found->limit_ns / 2;
    return is_free && state->had_work_ns >= found->start_ns ? HOST_NOT_BACK : HOST_NEVER_LEFT;
}

static void add_found(Text *to, const Found *found, long long now_ns) {
    const StreamState *own = state_of(found->watch);
    int is_back = found->written == HOST_NOT_BACK;
    add(to, "%s: %s stage %s%s, for %.1f s (limit %.1f s)\n", is_back ? "host_not_back" : "host_never_left",
        is_back ? "the GPU has done the work of" : "the host has not left", found->site_name,
        is_back ? ", and the host is not back" : ", and nothing has begun or ended in it", seconds(now_ns - found->active_ns),
        seconds(found->limit_ns));
    add(to, "thread: %s, ident %llu\ntrace: %016llx%016llx, span: %016llx\n", found->thread_name, found->thread, found->high,
        found->low, found->id);
    if (own != NULL) add_stream(to, own, now_ns);
}

static void add_head(Text *to, long long kept_ns) {
    char stamp[32] = "";
    time_t now = time(NULL);
    struct tm parts;
    if (gmtime_r(&now, &parts) != NULL) strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", &parts);
    add(to, "---- stall, %s, process %d\nno thread of Python has run for %.1f s: a call keeps the GIL\n", stamp, (int)getpid(),
        seconds(kept_ns));
}

/* A file of this user's, made if need be; neither a link nor too large. */
static int open_report(const char *path) {
    struct stat status;
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
    if (file < 0) return -1;
    if (!fstat(file, &status) && S_ISREG(status.st_mode) && status.st_uid == geteuid() && status.st_nlink == 1 &&
        status.st_size < MOST_BYTES)
        return file;
    close(file);
    return -1;
}

static int write_all(int file, const char *text, size_t size) {
    while (size) {
        ssize_t done = write(file, text, size);
        if (done <= 0) return -1;
        text += done;
        size -= (size_t)done;
    }
    return 0;
}

int write_report(const char *path, const Report *report) {
    static Text text;
    text.size = 0;
    add_head(&text, report->kept_ns);
    for (int i = 0; i < report->count; i++) add_found(&text, &report->found[i], report->now_ns);
    add(&text, "all streams:\n");
    for (int i = 0; i < state_count; i++) add_stream(&text, &states[i], report->now_ns);
    add(&text, "what runs, the oldest first:\n");
    for (int i = 0; i < report->line_count; i++) {
        const Line *line = &report->lines[i];
        add(&text, "%9.3f s  %s, thread %s\n", seconds(line->age_ns), line->site_name, line->thread_name);
    }
    add(&text, "stacks follow as soon as the GIL is free\n");
    int file = open_report(path);
    if (file < 0) return -1;
    int failed = write_all(file, text.text, text.size);
    close(file);
    return failed;
}
#endif
