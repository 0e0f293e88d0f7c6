"""The kernels that collectives through peer memory are made of, in CUDA C++.

Block b of every rank meets block b of every other rank twice: before the first byte is moved (buffers may be read and
written now) and after the last (everything has arrived). A rank says so by writing a number into the others' memory,
with release and acquire semantics at the scope of the system; the number counts the meetings of that block, so flags
are never reset. Who waits looks at a word of the host every now and then, which ends the waiting after a failure.
"""

from __future__ import annotations

THREADS = 512
MOST_RANKS = 16
LINE = 32
"""Flags of a block, 4 bytes each: a line of 128 bytes, one for each rank."""

SOURCE = """
// ELEMENT: bytes of what is summed up; BRAIN: whether two bytes are bfloat16; RANKS: how many sum up.
typedef unsigned long long u64;
struct Group { unsigned* flags[16]; unsigned* epochs; volatile int* abort; int ranks, here, first_block; };
struct Copy { const char* from; char* to; int sizes[4]; u64 reads[3], writes[3]; int width, pad; };
struct Sum {
    const char* from[16]; char* to[16]; int targets, pad; int sizes[4]; u64 reads[3], writes[3]; int width, op;
};

static __device__ __forceinline__ void tell(unsigned* flag, unsigned value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(flag), "r"(value) : "memory");
}
static __device__ __forceinline__ unsigned told(const unsigned* flag) {
    unsigned value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
static __device__ void meet(const Group& group, unsigned value) {
    __threadfence_system();
    __syncthreads();
    int peer = threadIdx.x;
    if (peer < group.ranks && peer != group.here) {
        int line = 32 * (group.first_block + blockIdx.x);
        tell(group.flags[peer] + line + group.here, value);
        const unsigned* own = group.flags[group.here] + line + peer;
        unsigned polls = 0;
        while ((int)(told(own) - value) < 0) {
            if ((++polls & 1023u) == 0 && *group.abort) break;
        }
    }
    __syncthreads();
}
static __device__ __forceinline__ unsigned begin(const Group& group) {
    unsigned epoch = group.epochs[group.first_block + blockIdx.x];
    meet(group, epoch + 1);
    return epoch;
}
static __device__ __forceinline__ void end(const Group& group, unsigned epoch) {
    meet(group, epoch + 2);
    if (threadIdx.x == 0) group.epochs[group.first_block + blockIdx.x] = epoch + 2;
}
struct Place { u64 read, write; };
template <typename Item> static __device__ __forceinline__ Place place(const Item& item, unsigned i, int width) {
    unsigned s3 = item.sizes[3], s2 = item.sizes[2], s1 = item.sizes[1];
    unsigned i3 = i % s3; i /= s3;
    unsigned i2 = i % s2; i /= s2;
    unsigned i1 = i % s1, i0 = i / s1;
    u64 inner = (u64)i3 * width;
    return {i0 * item.reads[0] + i1 * item.reads[1] + i2 * item.reads[2] + inner,
            i0 * item.writes[0] + i1 * item.writes[1] + i2 * item.writes[2] + inner};
}
template <typename T> static __device__ void copy(const Copy& item) {
    unsigned count = (unsigned)item.sizes[0] * item.sizes[1] * item.sizes[2] * item.sizes[3];
    unsigned step = gridDim.x * blockDim.x;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 4 * step) {
        T held[4];
        Place at[4];
        #pragma unroll
        for (int k = 0; k < 4; ++k) {
            unsigned j = i + k * step;
            if (j < count) {
                at[k] = place(item, j, sizeof(T));
                held[k] = *(const T*)(item.from + at[k].read);
            }
        }
        #pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (i + k * step < count) *(T*)(item.to + at[k].write) = held[k];
        }
    }
}
extern "C" __global__ void __launch_bounds__(512) onnxmesh_push(Group group, const Copy* items, int count) {
    unsigned epoch = begin(group);
    for (int n = 0; n < count; ++n) {
        const Copy& item = items[n];
        switch (item.width) {
            case 16: copy<uint4>(item); break;
            case 8: copy<uint2>(item); break;
            case 4: copy<unsigned>(item); break;
            case 2: copy<unsigned short>(item); break;
            default: copy<unsigned char>(item);
        }
    }
    end(group, epoch);
}
#if ELEMENT == 4
typedef float element;
static __device__ __forceinline__ float load(element x) { return x; }
static __device__ __forceinline__ element store(float x) { return x; }
#elif ELEMENT == 2
typedef unsigned short element;
#if BRAIN
static __device__ __forceinline__ float load(element x) { return __uint_as_float((unsigned)x << 16); }
static __device__ __forceinline__ element store(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (element)((bits >> 16) | 0x40u);
    return (element)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#else
static __device__ __forceinline__ float load(element x) {
    float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y;
}
static __device__ __forceinline__ element store(float x) {
    element y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;
}
#endif
#endif
template <int N> struct alignas(N * sizeof(element)) Vector { element x[N]; };
template <int N> static __device__ void sum(const Sum& item) {
    typedef Vector<N> vector;
    unsigned count = (unsigned)item.sizes[0] * item.sizes[1] * item.sizes[2] * item.sizes[3];
    unsigned step = gridDim.x * blockDim.x;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        Place at = place(item, i, sizeof(vector));
        float total[N];
        vector held[RANKS];
        #pragma unroll
        for (int r = 0; r < RANKS; ++r) held[r] = *(const vector*)(item.from[r] + at.read);
        #pragma unroll
        for (int e = 0; e < N; ++e) total[e] = load(held[0].x[e]);
        #pragma unroll
        for (int r = 1; r < RANKS; ++r) {
            #pragma unroll
            for (int e = 0; e < N; ++e) total[e] += load(held[r].x[e]);
        }
        vector result;
        #pragma unroll
        for (int e = 0; e < N; ++e) result.x[e] = store(item.op ? total[e] / RANKS : total[e]);
        for (int t = 0; t < item.targets; ++t) *(vector*)(item.to[t] + at.write) = result;
    }
}
extern "C" __global__ void __launch_bounds__(512) onnxmesh_sum(Group group, const Sum* items, int count) {
    unsigned epoch = begin(group);
    for (int n = 0; n < count; ++n) {
        const Sum& item = items[n];
        switch (item.width / sizeof(element)) {
#if ELEMENT == 2
            case 8: sum<8>(item); break;
#endif
            case 4: sum<4>(item); break;
            case 2: sum<2>(item); break;
            default: sum<1>(item);
        }
    }
    end(group, epoch);
}
"""
