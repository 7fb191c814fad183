/* The CUDA runtime as far as a kernel's host stub needs it, without a device: a launch is handed to the emulator.
 *
 * Linked into the emulator's own shared object of a kernel with -Bsymbolic (compile_worker.py), so that a real CUDA runtime in the
 * same process is never met. Whatever else the stub could call fails with cudaErrorNotSupported, and its name is kept.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_SUPPORTED = 801, CLUSTER_ATTRIBUTE = 4, OVERLAP_ATTRIBUTE = 6 };

struct attribute {
    int id, padding;
    union {
        unsigned cluster[3];
        int overlaps;
        char bytes[64];
    } value;
};

struct configuration {
    unsigned grid[3], block[3];
    size_t shared_bytes;
    void *stream;
    struct attribute *attributes;
    unsigned attribute_count;
};

typedef void launch_callback(const char *kernel, const unsigned *grid, const unsigned *block, const unsigned *cluster,
                             uint64_t shared_bytes, int overlaps, void **arguments);

static launch_callback *on_launch;
static const char *unsupported;

void emulator_on_launch(launch_callback *callback) { on_launch = callback; }

/* The CUDA function that was called and is not here, or NULL; forgotten by this call. */
const char *emulator_unsupported_call(void) {
    const char *name = unsupported;
    unsupported = NULL;
    return name;
}

int cudaGetDevice(int *device) { return *device = 0, SUCCESS; }
int cudaSetDevice(int device) { return device == 0 ? SUCCESS : INVALID_VALUE; }
int cudaGetDeviceCount(int *count) { return *count = 1, SUCCESS; }
int cudaGetLastError(void) { return SUCCESS; }
int cudaDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cudaDeviceSynchronize(void) { return SUCCESS; }
const char *cudaGetErrorName(int error) { return error == NOT_SUPPORTED ? "cudaErrorNotSupported" : "emulated CUDA error"; }
const char *cudaGetErrorString(int error) { return cudaGetErrorName(error); }
int cudaLibraryLoadData(void **library, const void *code) { return *library = (void *)code, SUCCESS; }
int cudaLibraryUnload(void *library) { return (void)library, SUCCESS; }
int cudaLibraryGetKernel(const char **kernel, void *library, const char *name) { /* a kernel is its name, kept for the process's life */
    return (void)library, *kernel = strdup(name), SUCCESS;
}
int cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
    return (void)kernel, (void)attribute, (void)value, (void)device, SUCCESS;
}
int cudaFuncSetAttribute(void *kernel, int attribute, int value) { return (void)kernel, (void)attribute, (void)value, SUCCESS; }

/* Of an H100, those that host stubs ask for. */
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    static const struct { int attribute, value; } known[] = {
        {16, 132}, {75, 9}, {76, 0}, {97, 232448}, /* multiprocessors, compute capability, shared bytes a block may ask for */
    };
    (void)device;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].attribute == attribute) return *value = known[i].value, SUCCESS;
    static char name[48];
    snprintf(name, sizeof name, "cudaDeviceGetAttribute(%d)", attribute);
    return unsupported = name, NOT_SUPPORTED;
}

int cudaLaunchKernelExC(const struct configuration *config, const char *kernel, void **arguments) {
    unsigned cluster[3] = {1, 1, 1};
    int overlaps = 0;
    for (unsigned i = 0; i < config->attribute_count; i++) {
        const struct attribute *attribute = &config->attributes[i];
        if (attribute->id == CLUSTER_ATTRIBUTE) memcpy(cluster, attribute->value.cluster, sizeof cluster);
        if (attribute->id == OVERLAP_ATTRIBUTE) overlaps = attribute->value.overlaps;
    }
    if (!on_launch) return NOT_SUPPORTED;
    on_launch(kernel, config->grid, config->block, cluster, config->shared_bytes, overlaps, arguments);
    return SUCCESS;
}

static int kernel_get_attribute(int *value, int attribute, void *kernel, int device) {
    return (void)attribute, (void)kernel, (void)device, *value = 0, SUCCESS;
}

static int device_get(int *device, int ordinal) { return *device = ordinal, SUCCESS; }

int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags, int *status) {
    (void)version, (void)flags;
    *function = NULL;
    if (!strcmp(symbol, "cuKernelGetAttribute")) *function = (void *)kernel_get_attribute;
    if (!strcmp(symbol, "cuDeviceGet")) *function = (void *)device_get;
    if (!*function) unsupported = symbol;
    if (status) *status = *function ? 0 : 1;
    return SUCCESS;
}

#define UNSUPPORTED(name) \
    int cuda##name(void) { return unsupported = "cuda" #name, NOT_SUPPORTED; }

UNSUPPORTED(EventCreate)
UNSUPPORTED(EventDestroy)
UNSUPPORTED(EventElapsedTime)
UNSUPPORTED(EventRecord)
UNSUPPORTED(Free)
UNSUPPORTED(FreeAsync)
UNSUPPORTED(FreeHost)
UNSUPPORTED(GraphDestroy)
UNSUPPORTED(GraphExecDestroy)
UNSUPPORTED(GraphInstantiate)
UNSUPPORTED(GraphLaunch)
UNSUPPORTED(LibraryGetGlobal)
UNSUPPORTED(LibraryGetKernelCount)
UNSUPPORTED(LibraryGetManaged)
UNSUPPORTED(LibraryGetUnifiedFunction)
UNSUPPORTED(LibraryLoadFromFile)
UNSUPPORTED(Malloc)
UNSUPPORTED(MallocAsync)
UNSUPPORTED(MallocHost)
UNSUPPORTED(MallocManaged)
UNSUPPORTED(Memcpy)
UNSUPPORTED(MemcpyAsync)
UNSUPPORTED(Memset)
UNSUPPORTED(MemsetAsync)
UNSUPPORTED(OccupancyMaxActiveBlocksPerMultiprocessor)
UNSUPPORTED(ProfilerStart)
UNSUPPORTED(ProfilerStop)
UNSUPPORTED(StreamAddCallback)
UNSUPPORTED(StreamBeginCapture)
UNSUPPORTED(StreamCreate)
UNSUPPORTED(StreamDestroy)
UNSUPPORTED(StreamEndCapture)
UNSUPPORTED(StreamSynchronize)
UNSUPPORTED(StreamWaitEvent)
