/* Several launches as one call, for a host whose time goes into calls from Python. No device code.

   Twice a function of TVM-FFI, whose calls cute_runtime/launches.py makes:

       kernel(program, function, ...) -> launch    once for each configuration; keeps the functions alive
       launch(tensor, ...) -> None                 calls the functions one after the other
                           -> int                  no function was called, for the tensor of this number is not as the program has it

   The program is one-dimensional int64 on the CPU. Numbers of tensors count the given ones first, then the parts:

       given, parts, calls
       each given tensor: 0, alignment in bytes, dtype's code, bits, dimensions, shape, strides in elements; -1 dimensions for None
       each part:         number of the tensor it lies in, offset in bytes, then as above
       each call:         function, arguments, then kind and value of each: NOTHING 0, TENSOR number, INTEGER value, REAL bits

   A part is a tensor made here, on the caller's stack, over memory that was given: no view of PyTorch's. All given tensors must lie on
   the first one's device, and the first one is never None. The caller sets the environment's stream, from the same first tensor, and a kernel asks for it: streams and
   capture are as in a call of its own. The first function that fails ends the list, and its error is the caller's.
   Nothing is written but the stack: threads may call at once. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { MOST_TENSORS = 32, MOST_ARGUMENTS = 24 };
enum { NOTHING, TENSOR, INTEGER, REAL };

typedef struct {
    int64_t source; /* of a part: the tensor that it lies in */
    int64_t offset; /* of a given tensor: its alignment */
    DLTensor layout;
} Tensor;

typedef struct {
    TVMFFIObjectHandle function;
    int64_t count;
    const int64_t *arguments; /* kind and value of each */
} Call;

typedef struct {
    int64_t *program; /* shapes, strides and arguments point into it */
    int64_t given, tensors, calls;
    Tensor tensor[MOST_TENSORS];
    Call call[]; /* each holds one reference to its function */
} List;

static int fail(const char *message) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", message);
    return -1;
}

static const DLTensor *tensor_of(const TVMFFIAny *value) {
    if (value->type_index == kTVMFFIDLTensorPtr) return value->v_ptr;
    if (value->type_index == kTVMFFITensor) return (const DLTensor *)(value->v_obj + 1);
    return NULL;
}

static char *begin_of(const DLTensor *tensor) { return (char *)tensor->data + tensor->byte_offset; }

static int is_as(const DLTensor *tensor, const Tensor *wanted, DLDevice device) {
    const DLTensor *layout = &wanted->layout;
    if (tensor->ndim != layout->ndim || memcmp(&tensor->dtype, &layout->dtype, sizeof tensor->dtype)) return 0;
    if (tensor->device.device_type != device.device_type || tensor->device.device_id != device.device_id) return 0;
    if ((uintptr_t)begin_of(tensor) % (uintptr_t)wanted->offset) return 0;
    for (int i = 0; i < layout->ndim; i++) {
        if (tensor->shape[i] != layout->shape[i]) return 0;
        /* The stride of a dimension of one element says nothing; without strides a tensor is contiguous. */
        if (tensor->strides && layout->shape[i] != 1 && tensor->strides[i] != layout->strides[i]) return 0;
    }
    return 1;
}

static int launch(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result) {
    const List *list = self;
    DLTensor tensor[MOST_TENSORS];
    if (count != list->given) return fail("launches: called with another number of tensors than the program has");
    for (int64_t i = 0; i < list->given; i++) {
        const Tensor *wanted = &list->tensor[i];
        const DLTensor *one = tensor_of(&given[i]);
        int is_none = wanted->layout.ndim < 0;
        if (is_none ? given[i].type_index != kTVMFFINone : !one || !is_as(one, wanted, i ? tensor[0].device : one->device)) {
            *result = (TVMFFIAny){.type_index = kTVMFFIInt, .v_int64 = i};
            return 0;
        }
        tensor[i] = is_none ? wanted->layout : *one;
    }
    for (int64_t i = list->given; i < list->tensors; i++) {
        tensor[i] = list->tensor[i].layout;
        tensor[i].data = begin_of(&tensor[list->tensor[i].source]) + list->tensor[i].offset;
        tensor[i].device = tensor[0].device;
    }
    for (const Call *call = list->call; call < list->call + list->calls; call++) {
        TVMFFIAny arguments[MOST_ARGUMENTS], ignored = {.type_index = kTVMFFINone};
        for (int64_t i = 0; i < call->count; i++) {
            int64_t kind = call->arguments[2 * i], value = call->arguments[2 * i + 1];
            static const int32_t types[] = {kTVMFFINone, kTVMFFIDLTensorPtr, kTVMFFIInt, kTVMFFIFloat};
            if (kind == TENSOR && tensor[value].ndim < 0) kind = NOTHING;
            arguments[i] = (TVMFFIAny){.type_index = types[kind], .v_int64 = value};
            if (kind == TENSOR) arguments[i].v_ptr = &tensor[value];
            if (kind == NOTHING) arguments[i].v_int64 = 0;
        }
        int failed = TVMFFIFunctionCall(call->function, arguments, (int32_t)call->count, &ignored);
        if (failed) return failed; /* its error is set already */
        if (ignored.type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(ignored.v_obj);
    }
    *result = (TVMFFIAny){.type_index = kTVMFFINone};
    return 0;
}

static void release(void *self) {
    List *list = self;
    for (int64_t i = 0; i < list->calls; i++) TVMFFIObjectDecRef(list->call[i].function);
    free(list->program);
    free(list);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_kernel(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result) {
    const DLTensor *program = count ? tensor_of(given) : NULL;
    if (!program || program->ndim != 1 || program->dtype.bits != 64 || program->device.device_type != kDLCPU || program->shape[0] < 3)
        return fail("launches: the program must be int64 on the CPU");
    int64_t bytes = program->shape[0] * (int64_t)sizeof(int64_t);
    int64_t *words = memcpy(malloc(bytes), begin_of(program), bytes), *word = words + 3;
    List *list = calloc(1, sizeof(List) + words[2] * sizeof(Call));
    list->program = words, list->given = words[0], list->tensors = words[0] + words[1];
    int valid = list->tensors <= MOST_TENSORS;
    for (int64_t i = 0; valid && i < list->tensors; i++) {
        DLDataType dtype = {.code = (uint8_t)word[2], .bits = (uint8_t)word[3], .lanes = 1};
        int32_t ndim = (int32_t)word[4], written = ndim < 0 ? 0 : ndim;
        DLTensor layout = {.ndim = ndim, .dtype = dtype, .shape = word + 5, .strides = word + 5 + written};
        list->tensor[i] = (Tensor){.source = word[0], .offset = word[1], .layout = layout};
        word += 5 + 2 * written;
    }
    for (int64_t i = 0; valid && i < words[2]; i++) {
        valid = word[0] + 1 < count && given[word[0] + 1].type_index == kTVMFFIFunction && word[1] <= MOST_ARGUMENTS;
        if (!valid) break;
        list->call[i] = (Call){.function = given[word[0] + 1].v_ptr, .count = word[1], .arguments = word + 2};
        TVMFFIObjectIncRef(list->call[i].function);
        list->calls = i + 1;
        word += 2 + 2 * word[1];
    }
    TVMFFIObjectHandle made = NULL;
    if (!valid || TVMFFIFunctionCreate(list, launch, release, &made)) {
        release(list);
        return valid ? -1 : fail("launches: the program has too many tensors or arguments, or a function that is none");
    }
    *result = (TVMFFIAny){.type_index = kTVMFFIFunction, .v_ptr = made};
    return 0;
}
