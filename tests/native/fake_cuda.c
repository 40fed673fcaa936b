/*
 * A CUDA driver for tests of `CudaDevice` and of the parts in C on machines without one. Work on a stream takes no time.
 *
 * Events remember when they were recorded. `fake_answer` sets what the next calls of `cuEventRecord` answer, and
 * `fake_capture` says which stream is being captured.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    long long recorded_ns;
    int captured;
} Event;

static int answer, answers_left, contexts_pushed;
static void *captured_stream;
static long long records;

static long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

void fake_answer(int code, int calls) { answer = code, answers_left = calls; }
void fake_capture(void *stream) { captured_stream = stream; }
long long fake_records(void) { return records; }
int fake_contexts_pushed(void) { return contexts_pushed; }

int cuEventCreate(void **event, unsigned flags) {
    *event = calloc(1, sizeof(Event));
    return 0;
}

int cuEventRecord(Event *event, void *stream) {
    records++;
    if (answers_left > 0) {
        answers_left--;
        return answer;
    }
    if (event == NULL) return 400;
    event->recorded_ns = now_ns();
    event->captured = captured_stream != NULL && stream == captured_stream;
    return 0;
}

int cuEventQuery(Event *event) { return event->captured ? 1 : 0; }

int cuEventElapsedTime(float *ms, Event *start, Event *end) {
    if (start->captured || end->captured) return 1;
    *ms = (float)((double)(end->recorded_ns - start->recorded_ns) / 1e6);
    return 0;
}

int cuStreamIsCapturing(void *stream, int *status) {
    *status = captured_stream != NULL && stream == captured_stream;
    return 0;
}

int cuCtxPushCurrent_v2(void *context) { return contexts_pushed++, 0; }
int cuCtxPopCurrent_v2(void **context) { return contexts_pushed--, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return *stream = (void *)0x5000, 0; }
int cuThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = device < 2, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(0x1000L + device), 0; }
int cuDeviceGetName(char *name, int size, int device) { return strncpy(name, "Fake GPU", (size_t)size), 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { return memset(uuid, device, 16), 0; }
