/*
 * NVIDIA's management library for tests on machines without a GPU: two GPUs and an instance of one (MIG), which say what
 * they were told to. `fake_...` tell them.
 *
 * `fake_refuse` has calls of one name answer with a code, `fake_slow` makes each call take so many microseconds, and
 * `fake_calls` says how many calls there were. Structures and numbers are those of `nvml.h` of CUDA 12.
 */
#include <string.h>
#include <time.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, MOST = 300 };

typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; } Process;
typedef struct { unsigned pid; unsigned long long at_us; unsigned sm, memory, encoder, decoder; } Sample;
typedef struct {
    const char *uuid;
    int is_part;
    unsigned utilization, clock_mhz, power_mw, processes, samples;
    unsigned long long reasons;
    Process process[MOST];
    Sample sample[MOST];
} Gpu;

static Gpu gpus[] = {
    {.uuid = "GPU-00000000-0000-0000-0000-000000000000", .utilization = 50, .clock_mhz = 1500, .power_mw = 300000},
    {.uuid = "GPU-00000000-0000-0000-0000-000000000001", .utilization = 0, .clock_mhz = 210, .power_mw = 70000},
    {.uuid = "MIG-00000000-0000-0000-0000-000000000002", .is_part = 1},
};
static int refusal, is_initialised, slow_us, calls, initialisations;
static const char *refused;

static int answer(const char *name) {
    calls++;
    if (slow_us) nanosleep(&(struct timespec){0, slow_us * 1000L}, NULL);
    if (refused != NULL && strcmp(refused, name) == 0) return refusal;
    return is_initialised ? SUCCESS : UNINITIALIZED;
}
#define ANSWER() do { int code = answer(__func__); if (code != SUCCESS) return code; } while (0)

void fake_refuse(const char *name, int code) { refused = name == NULL ? NULL : strdup(name), refusal = code; }
void fake_slow(int us) { slow_us = us; }
int fake_calls(void) { return calls; }
int fake_initialisations(void) { return initialisations; }
void fake_gpu(int index, unsigned utilization, unsigned clock_mhz, unsigned power_mw, unsigned long long reasons) {
    Gpu *gpu = gpus + index;
    gpu->utilization = utilization, gpu->clock_mhz = clock_mhz, gpu->power_mw = power_mw, gpu->reasons = reasons;
}
void fake_processes(int index, const unsigned *pids, unsigned count) {
    for (unsigned i = 0; i < count; i++) gpus[index].process[i] = (Process){.pid = pids[i], .memory = 1 << 20};
    gpus[index].processes = count;
}
void fake_samples(int index, const unsigned *pids, const unsigned *sm, unsigned count, unsigned long long at_us) {
    for (unsigned i = 0; i < count; i++) gpus[index].sample[i] = (Sample){.pid = pids[i], .at_us = at_us, .sm = sm[i]};
    gpus[index].samples = count;
}

int nvmlInit_v2(void) {
    initialisations++;
    if (refused != NULL && strcmp(refused, "nvmlInit_v2") == 0) return refusal;
    is_initialised = 1;
    return SUCCESS;
}
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Unknown Error"; }
int nvmlDeviceGetHandleByUUID(const char *uuid, Gpu **device) {
    ANSWER();
    for (unsigned i = 0; i < sizeof gpus / sizeof *gpus; i++)
        if (strcmp(gpus[i].uuid, uuid) == 0) return *device = gpus + i, SUCCESS;
    return NOT_FOUND;
}
int nvmlDeviceIsMigDeviceHandle(Gpu *device, unsigned *is_mig) {
    ANSWER();
    return *is_mig = (unsigned)device->is_part, SUCCESS;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Gpu *device, Gpu **whole) {
    ANSWER();
    return device->is_part ? (*whole = gpus + 1, SUCCESS) : INVALID_ARGUMENT;
}
int nvmlDeviceGetUtilizationRates(Gpu *device, Utilization *utilization) {
    ANSWER();
    if (device->is_part) return NOT_SUPPORTED;
    return *utilization = (Utilization){.gpu = device->utilization}, SUCCESS;
}
int nvmlDeviceGetClockInfo(Gpu *device, int kind, unsigned *mhz) {
    ANSWER();
    return kind == 1 ? (*mhz = device->clock_mhz, SUCCESS) : INVALID_ARGUMENT;
}
int nvmlDeviceGetPowerUsage(Gpu *device, unsigned *mw) {
    ANSWER();
    return *mw = device->power_mw, SUCCESS;
}
#ifndef OLD
int nvmlDeviceGetCurrentClocksEventReasons(Gpu *device, unsigned long long *reasons) {
    ANSWER();
    return *reasons = device->reasons, SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *device, unsigned *count, Process *infos) {
#else
int nvmlDeviceGetCurrentClocksThrottleReasons(Gpu *device, unsigned long long *reasons) {
    ANSWER();
    return *reasons = device->reasons, SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v2(Gpu *device, unsigned *count, Process *infos) {
#endif
    ANSWER();
    unsigned room = *count;
    *count = device->processes;
    if (room < device->processes) return INSUFFICIENT_SIZE;
    memcpy(infos, device->process, sizeof(Process) * device->processes);
    return SUCCESS;
}
int nvmlDeviceGetProcessUtilization(Gpu *device, Sample *samples, unsigned *count, unsigned long long seen_us) {
    ANSWER();
    if (device->is_part) return NOT_SUPPORTED;
    unsigned found = 0, room = *count;
    for (unsigned i = 0; i < device->samples; i++)
        if (device->sample[i].at_us > seen_us && found < room) samples[found++] = device->sample[i];
    return *count = found, found ? SUCCESS : NOT_FOUND;
}
