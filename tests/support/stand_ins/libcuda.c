/* Stand-in for the CUDA driver: GPU memory is host memory, and every operation is finished when its call returns.

   Streams cannot be captured. LIBCUDA_INIT is the result of cuInit, LIBCUDA_FREE the free memory in bytes. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static long setting(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value ? atol(value) : otherwise;
}

int cuInit(unsigned flags) { return (int)setting("LIBCUDA_INIT", 0); }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuGetErrorName(int error, const char **name) {
    *name = error == 803 ? "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" : error == 801 ? "CUDA_ERROR_NOT_SUPPORTED" : NULL;
    return *name ? 0 : 1;
}
int cuGetErrorString(int error, const char **text) {
    *text = error == 803 ? "system has unsupported display driver / cuda driver combination"
                         : error == 801 ? "operation not supported" : NULL;
    return *text ? 0 : 1;
}
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin (stand-in)", size); return 0; }
int cuDeviceTotalMem_v2(size_t *total, int device) { *total = 8UL << 30; return 0; }
int cuDeviceGetAttribute(int *value, int code, int device) { *value = code == 75 ? 8 : 7; return 0; }

static unsigned context_flags;
int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) { context_flags = flags; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &context_flags; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetFlags(unsigned *flags) { *flags = context_flags | 8; return 0; }

int cuMemGetInfo_v2(size_t *available, size_t *total) {
    *available = (size_t)setting("LIBCUDA_FREE", 6L << 30);
    *total = 8UL << 30;
    return 0;
}
int cuMemAlloc_v2(uint64_t *address, size_t size) { *address = (uint64_t)(uintptr_t)calloc(1, size); return 0; }
int cuMemFree_v2(uint64_t address) { free((void *)(uintptr_t)address); return 0; }
int cuMemAllocHost_v2(void **address, size_t size) { *address = calloc(1, size); return 0; }
int cuMemFreeHost(void *address) { free(address); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t sink, const void *source, size_t size, void *stream) {
    memcpy((void *)(uintptr_t)sink, source, size);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *sink, uint64_t source, size_t size, void *stream) {
    memcpy(sink, (void *)(uintptr_t)source, size);
    return 0;
}

int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)7; return 0; }
int cuStreamSynchronize(void *stream) { return 0; }
int cuStreamDestroy_v2(void *stream) { return 0; }
int cuStreamBeginCapture_v2(void *stream, int mode) { return 801; }

int cuEventCreate(void **event, unsigned flags) { *event = calloc(1, sizeof(struct timespec)); return 0; }
int cuEventRecord(void *event, void *stream) { return clock_gettime(CLOCK_MONOTONIC, event); }
int cuEventSynchronize(void *event) { return 0; }
int cuEventElapsedTime(float *elapsed_ms, const struct timespec *start, const struct timespec *end) {
    *elapsed_ms = (float)((end->tv_sec - start->tv_sec) * 1e3 + (end->tv_nsec - start->tv_nsec) / 1e6);
    return 0;
}
int cuEventDestroy_v2(void *event) { free(event); return 0; }
